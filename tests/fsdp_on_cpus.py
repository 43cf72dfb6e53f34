"""FSDP2 over CPUs, for tests of what it does on accelerators: it runs over gloo, but accelerate does not ask it to."""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator, DistributedType, PartialState


def shard_on_cpus() -> None:
    """From here on accelerate makes an `Accelerator` that shards over CPUs, too, where it is asked for FSDP.

    It knows FSDP of accelerators alone, and would train by DDP without a word. For processes of their own.
    """
    usual = Accelerator.__init__

    def init(self: Accelerator, *args: Any, **options: Any) -> None:
        state = PartialState._shared_state
        asked = options.get("fsdp_plugin") is not None or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        on_cpus = asked and state.get("distributed_type") is DistributedType.MULTI_CPU
        if on_cpus:  # what it takes for the sign that FSDP will do
            state["distributed_type"] = DistributedType.MULTI_GPU
        usual(self, *args, **options)
        if on_cpus and state["distributed_type"] is DistributedType.MULTI_GPU:
            state["distributed_type"] = DistributedType.MULTI_CPU

    Accelerator.__init__ = init
