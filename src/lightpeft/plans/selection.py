"""Which units go: they sit in layers, they go in an order, and each layer keeps a floor.

Heads, neurons, experts, PEFT modules and ranks differ only in what a unit is, budgets only in which layers compete and
in how many units go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightpeft.config.light import Scope
from lightpeft.errors import require
from lightpeft.plans.scoring import Unit


@dataclass(frozen=True)
class Layer:
    """Units of one kind in one layer."""

    kind: Unit
    """What the units are; of heads, experts and neurons inside these, the smallest sets that can go together."""
    index: int | None
    """Of the block that has the units, or of the PEFT module that has the ranks; None: outside all blocks."""
    scores: Tensor
    """What the units are worth: [units]."""
    floor: int = 0
    """How many stay at least."""
    cost: int = 1
    """What every unit costs to keep, such as its parameters."""


Order = Callable[[Sequence[Layer]], Tensor]
"""From layers that compete to the order in which their units go: indices into the units of all of them, [units] int64,
the first to go first. Units that are not in it stay."""


def weakest_first(layers: Sequence[Layer]) -> Tensor:
    """All units by ascending score for what they cost, among equal ones the higher index first."""
    worth = torch.cat([layer.scores.double() / max(layer.cost, 1) for layer in layers])
    return len(worth) - 1 - worth.flip(0).argsort(stable=True)


def going(layers: Sequence[Layer], order: Order = weakest_first) -> Tensor:
    """The units that may go, as indices into the units of all layers, the first to go first: an order above the floors.

    Raises:
        LightPeftError: a score is not finite, or `order` gives no order of these units.
    """
    for layer in layers:
        finite = bool(torch.isfinite(layer.scores).all())
        require(finite, f"the scores of the {layer.kind} are not finite; the estimation stage diverged")
    sizes = torch.tensor([len(layer.scores) for layer in layers])
    units, there = order(layers), int(sizes.sum())
    ordered = len(units.unique()) == len(units) and bool(((units >= 0) & (units < there)).all())
    require(ordered, f"an order names each unit once, by an index below {there}; this one names one twice, or another")
    owners = torch.arange(len(layers)).repeat_interleave(sizes)[units]
    spare = (sizes - torch.tensor([layer.floor for layer in layers])).clamp_min(0).tolist()
    places = [(owners == index).nonzero().flatten()[:count] for index, count in enumerate(spare)]
    return units[torch.cat(places).sort().values]


def without(layers: Sequence[Layer], gone: Tensor) -> list[list[int]]:
    """The units that stay in each layer, ascending, when these, as indices into the units of all layers, go."""
    sizes = [len(layer.scores) for layer in layers]
    stays = torch.ones(sum(sizes), dtype=torch.bool).scatter(0, gone, False)
    return [of_layer.nonzero().flatten().tolist() for of_layer in stays.split(sizes)]


def keep(layers: Sequence[Layer], count: int, order: Order = weakest_first) -> list[list[int]]:
    """The units that stay in each layer, ascending, when `count` of all of them go, or as many as floors allow.

    Raises:
        LightPeftError: see `going`.
    """
    return without(layers, going(layers, order)[:count])


def keep_part(layers: Sequence[Layer], ratio: float, scope: Scope, order: Order = weakest_first) -> list[list[int]]:
    """`keep` when a part of the units of each layer goes (layerwise), or of those of all layers together (global)."""
    groups = [[layer] for layer in layers] if scope == "layerwise" else [layers]
    return [stay for group in groups for stay in keep(group, part_of(ratio, total(group)), order)]


def total(layers: Sequence[Layer]) -> int:
    """Units of all layers."""
    return sum(len(layer.scores) for layer in layers)


def part_of(ratio: float, units: int) -> int:
    """The nearest whole number to `ratio * units`, halves up."""
    return int(ratio * units + 0.5)
