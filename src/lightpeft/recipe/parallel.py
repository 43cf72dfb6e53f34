"""Several processes: one decision for all, and DistributedDataParallel around a model that was cut."""

from __future__ import annotations

from typing import TypeVar

from accelerate.utils import broadcast_object_list
from torch.nn.parallel import DistributedDataParallel

from lightpeft.training.host import Host

T = TypeVar("T")


def broadcast_from_main(value: T) -> T:
    """Return the main process's value in every process: values measured by each may differ in the last digit."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


def rewrap(trainer: Host) -> None:
    """Rebuild a trainer's DistributedDataParallel wrapper, if it has one, for the parameters that the model has now.

    The training loop holds a reference to the wrapper, so it has to stay the same object.
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
