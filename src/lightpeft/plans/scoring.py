"""Pure tensors to scores: how important a head, a neuron, a PEFT module or a rank is. Higher is more important.

A criterion is one pure function. Those in `STEP_CRITERIA` see masks and their gradients at every optimizer step and
are summed over the stage; `random` and the weight norms of `layout.squared_norms` are computed once, at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskGradients:
    """Gradients of the task's loss by the masks in one optimizer step, each [units], float32.

    The loss is a mean over examples. Absolute values and squares are taken of every example's gradient before they are
    averaged: a batch's gradient is a small mean under large noise, and its square or size would mostly be that noise.
    """

    mean: Tensor
    """Mean over examples: the batch's gradient, which trains the masks."""
    absolute: Tensor
    """Mean over examples of the absolute gradient."""
    squares: Tensor
    """Mean over examples of the squared gradient."""


def taylor(masks: Tensor, gradients: MaskGradients) -> Tensor:
    """First-order change of the loss when a unit is removed, `E|m * dL/dm|` (Michel et al. 2019). Shapes: [units]."""
    return masks.abs() * gradients.absolute


def fisher(masks: Tensor, gradients: MaskGradients) -> Tensor:
    """Diagonal empirical Fisher information of the masks, `E(dL/dm)^2` (Theis et al. 2018). Shapes: [units]."""
    return gradients.squares


STEP_CRITERIA: dict[str, Callable[[Tensor, MaskGradients], Tensor]] = {"taylor": taylor, "fisher": fisher}
"""Criteria of heads and neurons that are accumulated over optimizer steps: (masks, task gradients) -> score."""


def mask_size(masks: Tensor) -> Tensor:
    """The trained mask itself, `|m|` (Light-PEFT, section 3.2). Shape: [units]."""
    return masks.abs()


def random(count: int, generator: torch.Generator) -> Tensor:
    """Uniform scores, the baseline every other criterion must beat. Shape: [count]."""
    return torch.rand(count, generator=generator)


def module_ratio(delta: Tensor, base: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum over tokens of `||delta_M(x)|| / ||base_M(x)||` and the number of tokens (Light-PEFT, module importance).

    Args:
        delta: output of the PEFT module, [..., width].
        base: output of the frozen layer for the same tokens, [..., width].
        real: 1 for real tokens and 0 for padding, as many entries as tokens; None: all are real.
    """
    norms = [torch.linalg.vector_norm(x.detach(), dim=-1, dtype=torch.float32).flatten() for x in (delta, base)]
    ratio = norms[0] / norms[1].clamp_min(torch.finfo(torch.float32).eps)  # finite also where the base gives zero
    if real is None:
        return ratio.sum(), torch.full_like(ratio[0], ratio.numel())
    weight = real.flatten().to(ratio.dtype)
    # where, not a product: a padded token's ratio may be inf or nan
    return torch.where(weight > 0, ratio, 0.0).sum(), weight.sum()


def rank_taylor_terms(weight: Tensor, gradient: Tensor, dim: int) -> Tensor:
    """Signed mean over the other dimension of `W * dL/dW`, one value a rank: [rank].

    It is linear in the gradient, so it may be averaged over processes before its size is taken.

    Args:
        weight: A, [rank, in], with `dim` 1; or B, [out, rank], with `dim` 0. The gradient has the same shape.
        dim: the dimension that is not the rank.
    """
    return (weight * gradient).float().mean(dim)


def rank_taylor(down: Tensor, up: Tensor) -> Tensor:
    """Rank importance of one step from the signed means of A and B, [rank] each (Light-PEFT, rank importance).

    `I(r) = |mean(A[r] * dL/dA[r])| + |mean(B[:, r] * dL/dB[:, r])|`
    """
    return down.abs() + up.abs()


def rank_magnitude(down: Tensor, up: Tensor) -> Tensor:
    """Size of a rank's update, `||A[r]|| * ||B[:,r]||`: [rank, in], [out, rank] -> [rank]."""
    return down.detach().float().norm(dim=1) * up.detach().float().norm(dim=0)
