"""accelerate: what it keeps of a training that it has prepared, and FSDP where it knows none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import DistributedType, PartialState
from torch import nn


def forget_optimizers(accelerator: Any) -> None:
    """Let accelerate know of no optimizer: under float16 it would unscale the gradients of parameters that are gone."""
    accelerator._optimizers.clear()


def prepared(accelerator: Any, model: nn.Module, optimizer: Any) -> Any:
    """An optimizer as accelerate wraps it; of a model that it has sharded it wants to be shown the model, too."""
    return accelerator.prepare(model, optimizer)[1] if accelerator.is_fsdp2 else accelerator.prepare(optimizer)


@contextmanager
def as_it_is(model: nn.Module) -> Iterator[None]:
    """Inside the block a model computes in the precision of its weights, without the autocast of its training."""
    prepared = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if prepared is not None:
            vars(model)["forward"] = prepared


@contextmanager
def fsdp_on_cpus() -> Iterator[None]:
    """Inside the block accelerate makes an `Accelerator` that shards over CPUs, too, where it is asked for FSDP.

    It knows FSDP of accelerators alone, and would train by DDP without a word; FSDP2 itself runs over gloo.
    """
    state = PartialState._shared_state
    on_cpus = state.get("distributed_type") is DistributedType.MULTI_CPU
    if on_cpus:  # what it takes for the sign that FSDP will do
        state["distributed_type"] = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        if on_cpus and state["distributed_type"] is DistributedType.MULTI_GPU:
            state["distributed_type"] = DistributedType.MULTI_CPU
