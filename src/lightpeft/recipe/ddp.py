"""What a trainer holds of a model's parameters beside the model: wrappers of several processes, and optimizers."""

from __future__ import annotations

from typing import Any

from torch.nn.parallel import DistributedDataParallel


def rewrap(trainer: Any) -> None:
    """Let the wrapper that averages gradients over processes know the parameters that the model has now.

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


def forget_optimizers(accelerator: Any) -> None:
    """Let accelerate know of no optimizer: under float16 it would unscale the gradients of parameters that are gone."""
    accelerator._optimizers.clear()
