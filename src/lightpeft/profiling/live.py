"""What measuring does with a live model: where it is, what trains, its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightpeft.errors import require
from lightpeft.machine import autocasting
from lightpeft.models.patching import in_mode
from lightpeft.peft_kinds.sites import fused_answers

Batch = Mapping[str, Tensor]
"""Keyword arguments of the model's forward; with `labels` wherever a loss is needed."""


def device_of(model: nn.Module) -> torch.device:
    """Where the model's (first) parameters are."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def moved(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch on a device."""
    return {name: value.to(device) for name, value in batch.items()}


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a batch.

    Raises:
        LightPeftError: the model returned none.
    """
    loss = getattr(model(**batch), "loss", None)
    require(loss is not None, "the model returned no loss; give batches with labels")
    assert isinstance(loss, Tensor)
    return loss


@torch.no_grad()
def losses_of(model: nn.Module, batches: Sequence[Batch], autocast: torch.dtype | None = None) -> Tensor:
    """The losses of batches, nothing dropped out: [batches], float64, on the CPU.

    Args:
        autocast: half precision of the forward pass.

    Raises:
        LightPeftError: the model returned none, or one that is not finite.
    """
    device = device_of(model)
    with in_mode(model, training=False), fused_answers(model), autocasting(device, autocast):
        losses = torch.stack([loss_of(model, moved(batch, device)).double().cpu() for batch in batches])
    require(bool(losses.isfinite().all()), "the model's loss is NaN or infinite; train at a lower learning rate")
    return losses
