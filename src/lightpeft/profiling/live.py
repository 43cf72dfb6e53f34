"""Operations of measurements on a live model: its device, its trainable parameters, its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightpeft.errors import require
from lightpeft.machine import autocasting
from lightpeft.models.patching import in_mode
from lightpeft.peft_kinds.sites.inference import fused_inference

T = TypeVar("T")
Batch = Mapping[str, Tensor]
"""Keyword arguments of the model's forward; with `labels` wherever a loss is needed."""


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter; the CPU for a model without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def move_batch(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Move a batch to a device."""
    return {name: value.to(device) for name, value in batch.items()}


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the loss of a batch.

    Raises:
        LightPeftError: the model returned no loss.
    """
    return _require_loss(model(**batch))


def _require_loss(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    require(loss is not None, "the model returned no loss; give batches with labels")
    assert isinstance(loss, Tensor)
    return loss


def losses_of(model: nn.Module, batches: Sequence[Batch], autocast: torch.dtype | None = None) -> Tensor:
    """Compute the losses of batches in evaluation mode: [batches], float64, on the CPU.

    Args:
        autocast: half precision of the forward pass; None: no autocast.

    Raises:
        LightPeftError: the model returned no loss, or a loss that is not finite.
    """
    return _check_finite(_evaluate(model, batches, autocast, _require_loss))


def losses_and_classes_of(
    model: nn.Module, batches: Sequence[Batch], autocast: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the losses of batches, [batches] float64, and the predicted class of each row, [rows], on the CPU.

    Args:
        batches: inputs of a model whose logits are [rows, classes].
        autocast: half precision of the forward pass; None: no autocast.

    Raises:
        LightPeftError: the model returned no loss, or a loss that is not finite.
    """
    read = _evaluate(model, batches, autocast, lambda output: (_require_loss(output), output.logits.argmax(-1)))
    return _check_finite([loss for loss, _ in read]), torch.cat([classes for _, classes in read]).cpu()


@torch.no_grad()
def _evaluate(
    model: nn.Module, batches: Sequence[Batch], autocast: torch.dtype | None, take: Callable[[Any], T]
) -> list[T]:
    """Return `take(output)` of the model for each batch, in evaluation mode."""
    device = device_of(model)
    with in_mode(model, training=False), fused_inference(model), autocasting(device, autocast):
        return [take(model(**move_batch(batch, device))) for batch in batches]


def _check_finite(of_batches: Sequence[Tensor]) -> Tensor:
    losses = torch.stack(list(of_batches)).double().cpu()  # one copy to the host
    require(bool(losses.isfinite().all()), "the model's loss is NaN or infinite; train at a lower learning rate")
    return losses
