"""accelerate: its references to the optimizers and models that it has prepared."""

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
    "forget_optimizers",
    "keep_loss_undivided",
    "prepare_optimizer",
    "should_reduce_batch_size",
    "without_autocast",
]


def forget_optimizers(accelerator: Any) -> None:
    """Remove all optimizers from an accelerator: under float16 it would unscale gradients of removed parameters.

    Raises:
        LightPeftError: accelerate has no such list, and a gradient scaler is in use.
    """
    known = getattr(accelerator, "_optimizers", None)
    if known is not None:
        known.clear()
    elif accelerator.scaler is not None:
        raise unavailable("Training in float16", "accelerate has no Accelerator._optimizers")


def keep_loss_undivided() -> None:
    """Keep accelerate from dividing the loss by the gradient accumulation steps, which `Trainer` has done already.

    transformers 5.5 lets accelerate divide it again, so that gradients are too small by that number.
    """
    if GradientState is not None:
        GradientState().plugin_kwargs["num_steps"] = 1


def prepare_optimizer(accelerator: Any, model: nn.Module, optimizer: Any) -> Any:
    """Return an optimizer wrapped by accelerate, which under FSDP2 needs the model as well."""
    return accelerator.prepare(model, optimizer)[1] if accelerator.is_fsdp2 else accelerator.prepare(optimizer)


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Disable the autocast that accelerate has put around a model's forward inside the block."""
    prepared = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if prepared is not None:
            vars(model)["forward"] = prepared
