"""Importance scores of heads, neurons, experts, PEFT modules and ranks from tensors; higher is more important.

A criterion is one pure function and one line in `CRITERIA`, which names its units and its inputs. A criterion with
inputs of a single step is computed at every optimizer step and averaged; all others once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightpeft.plans.structure import MASKED


@dataclass(frozen=True)
class MaskGradients:
    """Gradients of the task's loss with respect to the masks in one optimizer step, each [units], float32.

    The loss is a mean over examples. Absolute values and squares are taken of every example's gradient before they are
    averaged: a batch's gradient is a small mean under large noise, and its square or size would mostly be that noise.
    """

    mean: Tensor
    """Mean of the examples' gradients: the gradient of the batch, which trains the masks."""
    absolute: Tensor
    """Mean of the examples' absolute gradients."""
    squares: Tensor
    """Mean of the examples' squared gradients."""


def taylor(masks: Tensor, gradients: MaskGradients) -> Tensor:
    """Compute the first-order change of the loss by removing a unit, `E|m * dL/dm|` (Michel et al. 2019): [units]."""
    return masks.abs() * gradients.absolute


def fisher(gradients: MaskGradients) -> Tensor:
    """Return the diagonal empirical Fisher information of the masks, `E(dL/dm)^2` (Theis et al. 2018): [units]."""
    return gradients.squares


def mask_size(masks: Tensor) -> Tensor:
    """Compute the size of the trained mask, `|m|` (Light-PEFT, section 3.2): [units]."""
    return masks.abs()


def random(count: int, generator: torch.Generator) -> Tensor:
    """Draw uniform scores, the baseline for all other criteria: [count]."""
    return torch.rand(count, generator=generator)


def weight_norm(squares: Tensor) -> Tensor:
    """Compute the norm of all weights of a unit from the sums of their squares: [units]."""
    return squares.sqrt()


def mean_ratio(ratios: Tensor) -> Tensor:
    """Divide the sums of ratios by the numbers of tokens, both of `module_ratio`: [2, modules] -> [modules]."""
    return ratios[0] / ratios[1].clamp_min(1)


def module_ratio(delta: Tensor, base: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum up `||delta_M(x)|| / ||base_M(x)||` over tokens, and count the tokens (Light-PEFT, module importance).

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
    """Compute the signed mean of `W * dL/dW` for each rank: [rank].

    The terms are linear in the gradient, so they may be averaged over processes before absolute values are taken.

    Args:
        weight: A, [rank, in], with `dim` 1; or B, [out, rank], with `dim` 0. The gradient has the same shape.
        dim: the dimension that is not the rank.
    """
    return (weight * gradient).float().mean(dim)


def rank_taylor(down: Tensor, up: Tensor) -> Tensor:
    """Compute the rank importance of one step (Light-PEFT, rank importance): [rank].

    `I(r) = |mean(A[r] * dL/dA[r])| + |mean(B[:, r] * dL/dB[:, r])|`, with the means from `rank_taylor_terms`.
    """
    return down.abs() + up.abs()


def module_taylor(of_ranks: Sequence[Tensor]) -> Tensor:
    """Sum up the Taylor importance of the ranks of each module: one [rank] for each module -> [modules]."""
    return torch.stack([ranks.sum() for ranks in of_ranks])


def rank_magnitude(down: Tensor, up: Tensor) -> Tensor:
    """Compute the size of a rank's update, `||A[r]|| * ||B[:,r]||`: [rank, in], [out, rank] -> [rank]."""
    return down.detach().float().norm(dim=1) * up.detach().float().norm(dim=0)


Unit = Literal["heads", "neurons", "experts", "expert_neurons", "modules", "ranks"]
Fact = Literal[
    "masks",  # masks of heads, neurons, experts and neurons of experts: [units]
    "gradients",  # gradients of the masks in one step: `MaskGradients`
    "squares",  # sums of the squared weights of the masked units: [units]
    "ratios",  # sums of ratios and numbers of tokens of modules, from `module_ratio`: [2, modules]
    "rank_taylor",  # Taylor scores of the ranks of every module: one [rank] for each module
    "down_terms",  # `rank_taylor_terms` of all A in one step: [ranks]
    "up_terms",  # `rank_taylor_terms` of all B in one step: [ranks]
    "down",  # A of the module that has the ranks: [rank, in]
    "up",  # B of the module that has the ranks: [out, rank]
    "count",  # number of units
    "generator",  # generator of random numbers
]
"""Names of the inputs of criteria."""
Facts = dict[Fact, Any]
"""Inputs of criteria by name, for some units."""

_OF_A_STEP: frozenset[Fact] = frozenset({"gradients", "down_terms", "up_terms"})
"""Inputs that change at every optimizer step."""


@dataclass(frozen=True)
class Criterion:
    """One way of scoring units."""

    name: str
    """Name in settings."""
    units: tuple[Unit, ...]
    """Kinds of units that the criterion scores."""
    score: Callable[..., Tensor]
    """Function from the inputs to one score for each unit."""
    needs: tuple[Fact, ...]
    """Names of the inputs of `score`, in its order."""

    def __call__(self, facts: Facts) -> Tensor:
        """Compute the scores of the units that the inputs belong to."""
        return self.score(*(facts[name] for name in self.needs))

    @property
    def every_step(self) -> bool:
        """True if the criterion is computed at every optimizer step, and not once at the end of the stage."""
        return not _OF_A_STEP.isdisjoint(self.needs)


CRITERIA = (
    Criterion("mask", MASKED, mask_size, ("masks",)),
    Criterion("taylor", MASKED, taylor, ("masks", "gradients")),
    Criterion("fisher", MASKED, fisher, ("gradients",)),
    Criterion("magnitude", MASKED, weight_norm, ("squares",)),
    Criterion("ratio", ("modules",), mean_ratio, ("ratios",)),
    Criterion("taylor", ("modules",), module_taylor, ("rank_taylor",)),
    Criterion("taylor", ("ranks",), rank_taylor, ("down_terms", "up_terms")),
    Criterion("magnitude", ("ranks",), rank_magnitude, ("down", "up")),
    Criterion("random", (*MASKED, "modules", "ranks"), random, ("count", "generator")),
)
"""All criteria; the types of the settings in `config.light` list the same names."""


def criteria(*units: Unit) -> dict[str, Criterion]:
    """Return name -> criterion for all criteria that score any of these units."""
    return {criterion.name: criterion for criterion in CRITERIA if not set(units).isdisjoint(criterion.units)}
