"""From scores and a budget to a plan: a pure function, so the same record and budget always give the same plan.

Every decision is the same small problem: units with scores sit in layers, so many of them have to go, and each layer
keeps a floor. Heads, neurons, PEFT modules and ranks differ only in what a unit is. Blocks that are left out whole have
gone before: they only count.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lightpeft.config import Budget
from lightpeft.errors import LightPeftError, require
from lightpeft.plans.records import BlockPlan, EstimationRecord, PrunePlan, block_parameters, removed_parameters
from lightpeft.plans.structure import BlockSpec, SiteSpec


def make_plan(record: EstimationRecord, budget: Budget) -> PrunePlan:
    """Decide which units stay.

    Counts are exact: of n units, `round(ratio * n)` go (layerwise: of each layer's n), lowest score first, and among
    equal scores the higher index first. `blocks` and `target` override the ratios of heads and neurons.

    Raises:
        LightPeftError: scores that are not finite, a missing criterion, or a budget that cannot be met.
    """
    specs = (*record.blocks, *record.left_out)
    too_deep = budget.blocks_left(len(specs)) < len(record.blocks)
    require(not too_deep, f"depth {budget.depth:g} leaves out blocks that the estimation had; estimate with this depth")
    if budget.blocks is not None:
        blocks = _blocks_by_cost(record, budget, budget.blocks)
    elif budget.target is not None:
        blocks = _blocks_for_target(record, budget, budget.target)
    else:
        blocks = _plan_blocks(record, budget)
    emptied = not any(block.heads or block.neurons for block in blocks)
    require(not emptied, "the budget would empty the model: no head and no neuron would stay; lower the ratios")
    sites = _plan_sites(record, budget, blocks)
    return PrunePlan(
        specs=specs,
        blocks=tuple(blocks),
        sites=sites,
        dense_sites=tuple(record.sites),
        base_parameters=record.base_parameters,
        fingerprint=record.fingerprint,
        budget={f.name: getattr(budget, f.name) for f in fields(Budget)},
    )


@dataclass(frozen=True)
class Selection:
    """How many units go and from where: the ratio, the scope it applies to, and the floor of each layer."""

    ratio: float
    scope: str
    floor: int
    what: str


def keep(scores: Sequence[Tensor], selection: Selection) -> list[list[int]]:
    """The units that stay in each layer, ascending. Floors win over ratios.

    Args:
        scores: one [units] tensor a layer.

    Raises:
        LightPeftError: a score is not finite.
    """
    finite = all(bool(torch.isfinite(layer).all()) for layer in scores)
    require(finite, f"the scores of the {selection.what} are not finite; the estimation stage diverged")
    if selection.scope == "layerwise":
        return [_without_lowest([layer], selection)[0] for layer in scores]
    return _without_lowest(scores, selection)


def _without_lowest(layers: Sequence[Tensor], selection: Selection) -> list[list[int]]:
    """What is left of the layers when the lowest units of all of them together are gone."""
    orders = [_weakest_first(layer) for layer in layers]
    removable = torch.cat([_first(order, len(order) - selection.floor) for order in orders])
    order = _weakest_first(torch.cat(list(layers)))
    gone = order[removable[order]][: _count(selection.ratio, len(order))]
    stays = torch.ones_like(removable).scatter(0, gone, False)
    return [part.nonzero().flatten().tolist() for part in stays.split([len(layer) for layer in layers])]


def _weakest_first(scores: Tensor) -> Tensor:
    """Indices by ascending score, among equal scores the higher index first."""
    return len(scores) - 1 - scores.flip(0).argsort(stable=True)


def _first(order: Tensor, count: int) -> Tensor:
    """Boolean per unit: whether it is among the first `count` of `order`."""
    return torch.zeros(len(order), dtype=torch.bool).scatter(0, order[: max(count, 0)], True)


def _count(ratio: float, units: int) -> int:
    """Units to remove: the nearest whole number to `ratio * units`, halves up."""
    return int(ratio * units + 0.5)


def _plan_blocks(record: EstimationRecord, budget: Budget) -> list[BlockPlan]:
    """Heads and neurons that stay, block by block."""
    units = _head_units(record, budget)
    heads = [of_block.mean for of_block in units]
    kept_heads = keep(heads, Selection(budget.heads, budget.heads_scope, budget.min_heads, "head units"))
    neurons = record.of_blocks("neurons", budget.neuron_criterion)
    kept_neurons = keep(neurons, Selection(budget.neurons, budget.neurons_scope, budget.min_neurons, "neurons"))
    return _block_plans(record, budget, units, kept_heads, kept_neurons)


def _block_plans(
    record: EstimationRecord,
    budget: Budget,
    units: Sequence[HeadUnits],
    heads: Sequence[list[int]],
    neurons: Sequence[list[int]],
) -> list[BlockPlan]:
    """Plans of the blocks from the head units and the neurons that stay; widths are rounded to `multiple_of`."""
    plans = []
    scores = record.of_blocks("neurons", budget.neuron_criterion)
    for spec, of_block, kept, layer, stay in zip(record.blocks, units, heads, scores, neurons, strict=True):
        queries = sorted(head for unit in kept for head in of_block.heads[unit])
        groups = sorted({head // spec.heads_per_kv for head in queries})
        untouched = budget.multiple_of == 1 or len(stay) == len(layer)
        width = len(stay) if untouched else _rounded(len(stay), budget.multiple_of, len(layer))
        plans.append(BlockPlan(tuple(queries), tuple(groups), tuple(_strongest(layer, width))))
    return plans


@dataclass(frozen=True)
class HeadUnits:
    """The smallest sets of query heads of a block that can go together.

    A unit is a KV group, or (balanced) one query head of every group, so that all groups stay equally large. Where
    every query head has its own KV head, both are single heads.
    """

    heads: list[list[int]]
    sum: Tensor
    """Scores of each unit's heads, added up: [units], float64."""
    parameters: int
    """What one unit takes with it."""

    @property
    def mean(self) -> Tensor:
        """Mean score of each unit's heads: [units]."""
        return self.sum / torch.tensor([len(unit) for unit in self.heads], dtype=torch.float64)


def _head_units(record: EstimationRecord, budget: Budget) -> list[HeadUnits]:
    """The head units of every block."""
    result = []
    for spec, scores in zip(record.blocks, record.of_blocks("heads", budget.head_criterion), strict=True):
        balanced = budget.head_unit == "balanced" and spec.heads_per_kv > 1
        units = _balanced_slices(spec, scores) if balanced else _groups(spec)
        sums = torch.stack([scores[unit].double().sum() for unit in units])
        parameters = spec.head_parameters * len(units[0]) + (0 if balanced else spec.kv_parameters)
        result.append(HeadUnits(units, sums, parameters))
    return result


def _blocks_by_cost(record: EstimationRecord, budget: Budget, part: float) -> list[BlockPlan]:
    """Heads and neurons of all blocks compete: the lowest score per parameter goes first, until `part` of all goes.

    With Fisher scores that is the set whose removal costs least by the second-order estimate of the loss in which units
    do not interact: removing unit i adds about F_i / 2, so what counts is F_i by what the unit costs to keep.
    """
    same = budget.head_criterion == budget.neuron_criterion
    require(same, "light.blocks compares heads with neurons; give head_criterion and neuron_criterion the same value")
    units = _head_units(record, budget)
    neurons = record.of_blocks("neurons", budget.neuron_criterion)
    layers = [Layer(of_block.sum, of_block.parameters, budget.min_heads) for of_block in units]
    for scores, spec in zip(neurons, record.blocks, strict=True):
        layers.append(Layer(scores.double(), spec.neuron_parameters, budget.min_neurons))
    order = cheapest_first(layers)
    whole = sum(block_parameters(spec) for spec in (*record.blocks, *record.left_out))

    def plan(count: int) -> list[BlockPlan]:
        kept = without(layers, order[:count])
        return _block_plans(record, budget, units, kept[: len(units)], kept[len(units) :])

    def reached(count: int) -> bool:
        return _removed(record, plan(count)) >= part * whole

    # counted in whole plans, because KV heads go with their last query head, and widths are rounded
    count = bisect_left(range(len(order) + 1), True, key=reached)
    require(
        count <= len(order),
        f"blocks {part:g} cannot be reached: at most {_removed(record, plan(len(order))) / whole:.3f} of the blocks' "
        "parameters can go within the floors; lower blocks, min_heads or min_neurons",
    )
    return plan(count)


def _removed(record: EstimationRecord, blocks: Sequence[BlockPlan]) -> int:
    """Parameters that go when `blocks` stays."""
    return removed_parameters(zip(record.blocks, blocks, strict=True), record.left_out)


@dataclass(frozen=True)
class Layer:
    """Units of one kind in one layer: scores [units], the parameters of each, and how many stay at least."""

    scores: Tensor
    parameters: int
    floor: int


def cheapest_first(layers: Sequence[Layer]) -> Tensor:
    """The units that may go, by ascending score per parameter, as indices into the units of all layers: [units].

    Raises:
        LightPeftError: a score is not finite.
    """
    finite = all(bool(torch.isfinite(layer.scores).all()) for layer in layers)
    require(finite, "the scores of the heads and neurons are not finite; the estimation stage diverged")
    removable = torch.cat([_first(_weakest_first(x.scores), len(x.scores) - x.floor) for x in layers])
    order = _weakest_first(torch.cat([layer.scores / max(layer.parameters, 1) for layer in layers]))
    return order[removable[order]]


def without(layers: Sequence[Layer], gone: Tensor) -> list[list[int]]:
    """The units that stay in each layer when these, as indices into the units of all layers, go."""
    sizes = [len(layer.scores) for layer in layers]
    stays = torch.ones(sum(sizes), dtype=torch.bool).scatter(0, gone, False)
    return [of_layer.nonzero().flatten().tolist() for of_layer in stays.split(sizes)]


def _groups(spec: BlockSpec) -> list[list[int]]:
    """The query heads of each KV group."""
    size = spec.heads_per_kv
    return [list(range(group * size, (group + 1) * size)) for group in range(spec.kv_heads)]


def _balanced_slices(spec: BlockSpec, scores: Tensor) -> list[list[int]]:
    """Slice j holds the j-th best query head of every KV group, so removing slices from the end removes the weakest."""
    ranked = scores.view(spec.kv_heads, spec.heads_per_kv).sort(dim=1, descending=True, stable=True).indices
    return [[group * spec.heads_per_kv + int(head) for group, head in enumerate(column)] for column in ranked.T]


def _rounded(width: int, multiple: int, dense: int) -> int:
    """The multiple nearest to `width` that is not zero (unless `width` is) and not wider than the dense layer."""
    if width == 0:
        return 0
    return min(max(int(width / multiple + 0.5), 1) * multiple, dense)


def _strongest(scores: Tensor, count: int) -> list[int]:
    """The `count` highest scores, equal ones by lower index; ascending indices."""
    return sorted(_weakest_first(scores)[len(scores) - count :].tolist())


def _blocks_for_target(record: EstimationRecord, budget: Budget, target: float) -> list[BlockPlan]:
    """The smallest common ratio of heads and neurons that removes `target` of all base parameters.

    Heads come in coarse steps, so the neurons' ratio is then lowered as far as the target allows.
    """

    def plan(heads: float, neurons: float) -> list[BlockPlan]:
        return _plan_blocks(record, replace(_plain(budget), heads=heads, neurons=neurons))

    def removed(blocks: list[BlockPlan]) -> float:
        return _removed(record, blocks) / record.base_parameters

    ratio = _smallest(lambda x: removed(plan(x, x)) >= target)
    if ratio is None:
        raise LightPeftError(
            f"target {target:g} cannot be reached: at most {removed(plan(_RATIOS[-1], _RATIOS[-1])):.3f} of all base "
            "parameters can go within the floors (embeddings are never pruned); lower target, min_heads or min_neurons"
        )
    neurons = _smallest(lambda x: removed(plan(ratio, x)) >= target, below=ratio)
    return plan(ratio, ratio if neurons is None else neurons)


_STEPS = 1000
_RATIOS = [step / _STEPS for step in range(_STEPS)]


def _smallest(reached: Callable[[float], bool], below: float = 1.0) -> float | None:
    """The smallest ratio in steps of a thousandth for which `reached` holds, by bisection; None if there is none."""
    low, high = 0, int(below * _STEPS + 0.5)
    while low < high:
        middle = (low + high) // 2
        if reached(_RATIOS[middle]):
            high = middle
        else:
            low = middle + 1
    return _RATIOS[low] if low < _STEPS and reached(_RATIOS[low]) else None


def _plain(budget: Budget) -> Budget:
    """The `Budget` part of a budget, without a target."""
    return Budget(**{**{f.name: getattr(budget, f.name) for f in fields(Budget)}, "target": None})


def _plan_sites(record: EstimationRecord, budget: Budget, blocks: list[BlockPlan]) -> dict[str, tuple[int, ...]]:
    """PEFT modules that stay, with the ranks of theirs that stay."""
    alive = [index for index, site in enumerate(record.sites) if _has_layer(site, blocks)]
    require(bool(alive), "every PEFT module sits in a sub-layer that the budget removes; lower the ratios")
    stay = _keep_modules(record, budget, alive)
    scores = record.of_ranks(budget.rank_criterion)
    kept = keep(
        [scores[index] for index in stay], Selection(budget.ranks, budget.ranks_scope, budget.min_ranks, "ranks")
    )
    return {record.sites[index].name: tuple(ranks) for index, ranks in zip(stay, kept, strict=True)}


def _has_layer(site: SiteSpec, blocks: list[BlockPlan]) -> bool:
    """Whether the sub-layer that holds the site is still there."""
    if site.block is None or site.slot is None:
        return True
    block = blocks[site.block]
    return bool(block.neurons if site.slot.startswith("ffn") else block.heads)


def _keep_modules(record: EstimationRecord, budget: Budget, alive: list[int]) -> list[int]:
    """Indices of the sites that stay. Sites whose sub-layer went count as removed; one site always stays."""
    scores = record.of_modules(budget.module_criterion)
    lowest = budget.first_module_block(len(record.blocks))
    allowed = {index for index, site in enumerate(record.sites) if site.block is None or site.block >= lowest}
    alive = [index for index in alive if index in allowed]
    require(bool(alive), "no PEFT module sits in the blocks that module_blocks allows; raise it, or lower the ratios")
    by_block: dict[int | None, list[int]] = {}
    for index in alive:
        by_block.setdefault(record.sites[index].block, []).append(index)
    layers = list(by_block.values())
    if budget.modules_scope == "global":
        lost = len(allowed) - len(alive)
        count = min(max(_count(budget.modules, len(allowed)) - lost, 0), len(alive) - 1)
        ratio = count / len(alive)
    else:
        ratio = budget.modules
    kept = keep(
        [scores[layer] for layer in layers],
        Selection(ratio, budget.modules_scope, budget.min_modules, "PEFT modules"),
    )
    stay = sorted(layer[unit] for layer, units in zip(layers, kept, strict=True) for unit in units)
    require(bool(stay), f"modules = {budget.modules:g} layerwise would remove every PEFT module; lower it")
    return stay
