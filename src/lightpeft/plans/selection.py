"""Selection of the units to remove: by an order over layers that compete, with a minimum for each layer.

Heads, neurons, experts, PEFT modules and ranks are selected alike; budgets differ in the layers that compete and in the
number of units to remove.
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
    """Kind of the units; heads, experts and neurons of experts come as the smallest sets that can be removed."""
    index: int | None
    """Index of the block of the units, or of the PEFT module of the ranks; None: outside all blocks."""
    scores: Tensor
    """Importance of the units: [units]."""
    floor: int = 0
    """Minimum number of units to keep."""
    cost: int = 1
    """Cost of keeping a unit, such as its number of parameters."""


Order = Callable[[Sequence[Layer]], Tensor]
"""Function from layers that compete to the order of removal: indices into the units of all layers, [units] int64, the
first unit to remove first. Units that are missing from the order are kept."""


def weakest_first(layers: Sequence[Layer]) -> Tensor:
    """Order all units by ascending score per cost, among equal ones the higher index first."""
    worth = torch.cat([layer.scores.double() / max(layer.cost, 1) for layer in layers])
    return len(worth) - 1 - worth.flip(0).argsort(stable=True)


def removal_order(layers: Sequence[Layer], order: Order = weakest_first) -> Tensor:
    """Return the order of removal without the units that the floors protect: indices into the units of all layers.

    Raises:
        LightPeftError: a score is not finite, or `order` returns no order of these units.
    """
    for layer in layers:
        finite = bool(torch.isfinite(layer.scores).all())
        require(finite, f"the scores of the {layer.kind} are not finite; estimate again at a lower learning rate")
    sizes = torch.tensor([len(layer.scores) for layer in layers])
    units, there = order(layers), int(sizes.sum())
    ordered = len(units.unique()) == len(units) and bool(((units >= 0) & (units < there)).all())
    require(ordered, f"order returned invalid unit indices; return indices below {there}, each at most once")
    owners = torch.arange(len(layers)).repeat_interleave(sizes)[units]
    spare = (sizes - torch.tensor([layer.floor for layer in layers])).clamp_min(0).tolist()
    places = [(owners == index).nonzero().flatten()[:count] for index, count in enumerate(spare)]
    return units[torch.cat(places).sort().values]


def remaining_units(layers: Sequence[Layer], gone: Tensor) -> list[list[int]]:
    """Return the units to keep in each layer, ascending.

    Args:
        gone: units to remove, as indices into the units of all layers.
    """
    sizes = [len(layer.scores) for layer in layers]
    stays = torch.ones(sum(sizes), dtype=torch.bool).scatter(0, gone, False)
    return [of_layer.nonzero().flatten().tolist() for of_layer in stays.split(sizes)]


def keep(layers: Sequence[Layer], count: int, order: Order = weakest_first) -> list[list[int]]:
    """Return the units to keep in each layer, ascending, after removing `count` of all, or as many as floors allow.

    Raises:
        LightPeftError: a score is not finite, or `order` returns no order of these units.
    """
    return remaining_units(layers, removal_order(layers, order)[:count])


def keep_part(layers: Sequence[Layer], ratio: float, scope: Scope, order: Order = weakest_first) -> list[list[int]]:
    """Return the units to keep in each layer after removing a fraction of each layer's units (layerwise) or of all."""
    groups = [[layer] for layer in layers] if scope == "layerwise" else [layers]
    return [stay for group in groups for stay in keep(group, round_share(ratio, total(group)), order)]


def total(layers: Sequence[Layer]) -> int:
    """Count the units of all layers."""
    return sum(len(layer.scores) for layer in layers)


def round_share(ratio: float, units: int) -> int:
    """Round `ratio * units` to the nearest whole number, halves up."""
    return int(ratio * units + 0.5)
