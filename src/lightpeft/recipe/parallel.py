"""Several processes: one decision for all, and a wrapper that learns of the parameters that a cut model has."""

from __future__ import annotations

from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list
from torch.nn.parallel import DistributedDataParallel

from lightpeft.errors import require
from lightpeft.machine import sharding_launched

T = TypeVar("T")


def agreed(value: T) -> T:
    """The value of the main process, in all: what they measured may differ in the last digit."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


def refuse_deepspeed(setting: object) -> None:
    """Refuse to train in DeepSpeed, which the launcher or a setting asks for.

    Args:
        setting: `deepspeed` of the training arguments.

    Raises:
        LightPeftError: saying what does the same.
    """
    require(
        not setting and not sharding_launched("DEEPSPEED"),
        "DeepSpeed builds an engine around the dense model, which does not follow the cut, and no light training was "
        "tried in it; FSDP2 shares the weights, too: accelerate launch --config_file configs/engines/fsdp2.yaml",
    )


def rewrap(trainer: Any) -> None:
    """Let a trainer's wrapper for several processes, if there is one, know the parameters that the model has now.

    The training loop holds the wrapper itself, so it has to stay the same object.
    """
    wrapper = trainer.model_wrapped
    if not isinstance(wrapper, DistributedDataParallel):
        return
    fresh = DistributedDataParallel(
        wrapper.module,
        device_ids=wrapper.device_ids,
        output_device=wrapper.output_device,
        broadcast_buffers=wrapper.broadcast_buffers,
        find_unused_parameters=wrapper.find_unused_parameters,
        gradient_as_bucket_view=wrapper.gradient_as_bucket_view,
        static_graph=wrapper.static_graph,
    )
    vars(wrapper).clear()
    vars(wrapper).update(vars(fresh))
