"""accelerate: what it keeps of a training that it has prepared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightpeft.compat.missing import missing, unavailable

try:
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
except ImportError as _error:
    clear_device_cache = missing("Smaller batches where memory is short", _error)
    should_reduce_batch_size = missing("Smaller batches where memory is short", _error)

try:
    from accelerate.state import GradientState
except ImportError:
    GradientState = None

__all__ = [
    "clear_device_cache",
    "divide_no_loss",
    "forget_optimizers",
    "prepared",
    "should_reduce_batch_size",
    "without_autocast",
]


def forget_optimizers(accelerator: Any) -> None:
    """Let accelerate know of no optimizer: under float16 it would unscale the gradients of parameters that are gone."""
    known = getattr(accelerator, "_optimizers", None)
    if known is not None:
        known.clear()
    elif accelerator.scaler is not None:
        raise unavailable("Training in float16", "accelerate has no Accelerator._optimizers")


def divide_no_loss() -> None:
    """Let accelerate take the loss of a part of a step as it is, because `Trainer` has divided it by the parts.

    transformers 5.5 has accelerate divide it once more: gradients are too small by the number of parts.
    """
    if GradientState is not None:
        GradientState().plugin_kwargs["num_steps"] = 1


def prepared(accelerator: Any, model: nn.Module, optimizer: Any) -> Any:
    """An optimizer as accelerate wraps it; of a model that it has sharded it wants to be shown the model, too."""
    return accelerator.prepare(model, optimizer)[1] if accelerator.is_fsdp2 else accelerator.prepare(optimizer)


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Inside the block a model computes in the precision of its weights, without the autocast of its training."""
    prepared = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if prepared is not None:
            vars(model)["forward"] = prepared
