"""Pure tensors to scores: how important a head, a neuron, an expert, a PEFT module or a rank is. Higher is more.

A criterion is one pure function and one line in `CRITERIA`, which says what units it scores and what it needs to know.
What needs to know of a step is scored at every optimizer step, and its mean counts; the rest once, in the end.
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


def fisher(gradients: MaskGradients) -> Tensor:
    """Diagonal empirical Fisher information of the masks, `E(dL/dm)^2` (Theis et al. 2018). Shapes: [units]."""
    return gradients.squares


def mask_size(masks: Tensor) -> Tensor:
    """The trained mask itself, `|m|` (Light-PEFT, section 3.2). Shape: [units]."""
    return masks.abs()


def random(count: int, generator: torch.Generator) -> Tensor:
    """Uniform scores, the baseline every other criterion must beat. Shape: [count]."""
    return torch.rand(count, generator=generator)


def weight_norm(squares: Tensor) -> Tensor:
    """Norm of all weights that a unit takes with it, from the sums of their squares. Shapes: [units]."""
    return squares.sqrt()


def mean_ratio(ratios: Tensor) -> Tensor:
    """Mean over tokens of the ratios that `module_ratio` sums up: [sums and tokens, modules] -> [modules]."""
    return ratios[0] / ratios[1].clamp_min(1)


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


def module_taylor(of_ranks: Sequence[Tensor]) -> Tensor:
    """Taylor importance of a module, the sum of that of its ranks: one [rank] a module -> [modules]."""
    return torch.stack([ranks.sum() for ranks in of_ranks])


def rank_magnitude(down: Tensor, up: Tensor) -> Tensor:
    """Size of a rank's update, `||A[r]|| * ||B[:,r]||`: [rank, in], [out, rank] -> [rank]."""
    return down.detach().float().norm(dim=1) * up.detach().float().norm(dim=0)


Unit = Literal["heads", "neurons", "experts", "expert_neurons", "modules", "ranks"]
Fact = Literal[
    "masks",  # of heads, neurons, experts and their neurons: [units]
    "gradients",  # of the masks in one step: `MaskGradients`
    "squares",  # sums of the squared weights that each of these takes with it: [units]
    "ratios",  # of modules, as `module_ratio` sums them up: [sums and tokens, modules]
    "rank_taylor",  # Taylor scores of the ranks of every module: one [rank] a module
    "down_terms",  # `rank_taylor_terms` of all A in one step: [ranks]
    "up_terms",  # and of all B
    "down",  # A of the module that has the ranks: [rank, in]
    "up",  # and B: [out, rank]
    "count",  # how many units there are
    "generator",  # of random numbers
]
"""What estimation can know of units."""
Facts = dict[Fact, Any]
"""What is known of some units."""

_OF_A_STEP: frozenset[Fact] = frozenset({"gradients", "down_terms", "up_terms"})
"""What is another at every optimizer step."""


@dataclass(frozen=True)
class Criterion:
    """One way of scoring units."""

    name: str
    """As settings call it."""
    units: tuple[Unit, ...]
    """What it scores."""
    score: Callable[..., Tensor]
    """From what it needs to one score a unit."""
    needs: tuple[Fact, ...]
    """What `score` takes, in its order."""

    def __call__(self, facts: Facts) -> Tensor:
        """The scores of the units that these facts are of."""
        return self.score(*(facts[name] for name in self.needs))

    @property
    def every_step(self) -> bool:
        """Whether it scores every optimizer step, and not the stage in its end."""
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
"""All criteria. The types of the settings in `config.light` name the same ones."""


def criteria(*units: Unit) -> dict[str, Criterion]:
    """The criteria of any of these units by name."""
    return {criterion.name: criterion for criterion in CRITERIA if not set(units).isdisjoint(criterion.units)}
