"""From scores and a budget to a plan: a pure function, so the same record and budget always give the same plan.

Heads and neurons of the blocks are selected first, then PEFT modules among those whose layer is still there, then their
ranks. Blocks that are left out whole have gone before: they only count.
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
from lightpeft.plans.selection import Layer, Order, going, keep, keep_part, part_of, total, weakest_first, without
from lightpeft.plans.structure import BlockSpec, SiteSpec


def make_plan(record: EstimationRecord, budget: Budget, order: Order | None = None) -> PrunePlan:
    """Decide which units stay.

    Counts are exact: of n units, `round(ratio * n)` go (layerwise: of each layer's n), lowest score first, and among
    equal scores the higher index first. `blocks` and `target` override the ratios of heads and neurons.

    Args:
        order: in which heads and neurons go instead; how many, and the floors, are still the budget's. It is asked for
            the layers that compete, and for a layer alone where its width is rounded.

    Raises:
        LightPeftError: scores that are not finite, a missing criterion, a budget that cannot be met, or an `order` that
            is not one of the units.
    """
    specs = (*record.blocks, *record.left_out)
    too_deep = budget.blocks_left(len(specs)) < len(record.blocks)
    require(not too_deep, f"depth {budget.depth:g} leaves out blocks that the estimation had; estimate with this depth")
    blocks = _Blocks(record, budget, order or weakest_first).stay()
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


# Heads and neurons


@dataclass(frozen=True)
class HeadUnits:
    """The smallest sets of query heads of a block that can go together.

    A unit is a KV group, or (balanced) one query head of every group, so that all groups stay equally large. Where
    every query head has its own KV head, both are single heads.
    """

    heads: list[list[int]]
    scores: Tensor
    """Scores of each unit's heads, added up: [units], float64."""
    parameters: int
    """What one unit takes with it."""


def head_units(record: EstimationRecord, budget: Budget) -> list[HeadUnits]:
    """The head units of every block."""
    result = []
    for spec, scores in zip(record.blocks, record.of_blocks("heads", budget.head_criterion), strict=True):
        balanced = budget.head_unit == "balanced" and spec.heads_per_kv > 1
        units = _balanced_slices(spec, scores) if balanced else _groups(spec)
        sums = torch.stack([scores[unit].double().sum() for unit in units])
        parameters = spec.head_parameters * len(units[0]) + (0 if balanced else spec.kv_parameters)
        result.append(HeadUnits(units, sums, parameters))
    return result


def _groups(spec: BlockSpec) -> list[list[int]]:
    """The query heads of each KV group."""
    size = spec.heads_per_kv
    return [list(range(group * size, (group + 1) * size)) for group in range(spec.kv_heads)]


def _balanced_slices(spec: BlockSpec, scores: Tensor) -> list[list[int]]:
    """Slice j holds the j-th best query head of every KV group, so removing slices from the end removes the weakest."""
    ranked = scores.view(spec.kv_heads, spec.heads_per_kv).sort(dim=1, descending=True, stable=True).indices
    return [[group * spec.heads_per_kv + int(head) for group, head in enumerate(column)] for column in ranked.T]


class _Blocks:
    """Heads and neurons of all blocks, and what a budget keeps of them."""

    def __init__(self, record: EstimationRecord, budget: Budget, order: Order) -> None:
        same = budget.blocks is None or budget.head_criterion == budget.neuron_criterion
        instead = "give head_criterion and neuron_criterion the same value"
        require(same, f"light.blocks compares heads with neurons; {instead}")
        self.record, self.budget, self.order = record, budget, order
        self.units = head_units(record, budget)
        neurons = record.of_blocks("neurons", budget.neuron_criterion)
        self.heads = [self._heads(*block) for block in zip(record.blocks, self.units, strict=True)]
        self.neurons = [self._neurons(*block) for block in zip(record.blocks, neurons, strict=True)]

    def _heads(self, spec: BlockSpec, units: HeadUnits) -> Layer:
        """Head units by score per parameter where they compete with neurons, else by the mean of their heads."""
        cost = len(units.heads[0]) if self.budget.blocks is None else units.parameters
        return Layer("heads", spec.index, units.scores, self.budget.min_heads, cost)

    def _neurons(self, spec: BlockSpec, scores: Tensor) -> Layer:
        """Neurons by score per parameter where they compete with heads, else by score."""
        cost = 1 if self.budget.blocks is None else spec.neuron_parameters
        return Layer("neurons", spec.index, scores, self.budget.min_neurons, cost)

    def stay(self) -> list[BlockPlan]:
        """What stays of each block."""
        budget = self.budget
        part = budget.known_blocks
        if part is not None:
            return self._by_cost(part)
        if budget.target is not None:
            return self._for_target(budget.target)
        return self._by_ratios(budget.heads, budget.neurons)

    def _by_ratios(self, heads: float, neurons: float) -> list[BlockPlan]:
        """These parts of heads and neurons go."""
        kept_heads = keep_part(self.heads, heads, self.budget.heads_scope, self.order)
        return self._block_plans(kept_heads, keep_part(self.neurons, neurons, self.budget.neurons_scope, self.order))

    def _for_target(self, target: float) -> list[BlockPlan]:
        """The smallest common ratio of heads and neurons that removes `target` of all base parameters.

        Heads come in coarse steps, so the neurons' ratio is then lowered as far as the target allows.
        """

        def removed(heads: float, neurons: float) -> float:
            return self._removed(self._by_ratios(heads, neurons)) / self.record.base_parameters

        ratio = _smallest(lambda x: removed(x, x) >= target)
        if ratio is None:
            raise LightPeftError(
                f"target {target:g} cannot be reached: at most {removed(_RATIOS[-1], _RATIOS[-1]):.3f} of all base "
                "parameters can go within the floors (embeddings are never pruned); lower target, min_heads or "
                "min_neurons"
            )
        neurons = _smallest(lambda x: removed(ratio, x) >= target, below=ratio)
        return self._by_ratios(ratio, ratio if neurons is None else neurons)

    def _by_cost(self, part: float) -> list[BlockPlan]:
        """Heads and neurons of all blocks compete: the lowest score per parameter goes first, until `part` of all goes.

        With Fisher scores that is the set whose removal costs least by the second-order estimate of the loss in which
        units do not interact: removing unit i adds about F_i / 2, so what counts is F_i by what the unit costs to keep.
        """
        layers = [*self.heads, *self.neurons]
        queue = going(layers, self.order)
        whole = sum(block_parameters(spec) for spec in (*self.record.blocks, *self.record.left_out))

        def plans(count: int) -> list[BlockPlan]:
            kept = without(layers, queue[:count])
            return self._block_plans(kept[: len(self.heads)], kept[len(self.heads) :])

        # counted in whole plans, because KV heads go with their last query head, and widths are rounded
        count = bisect_left(range(len(queue) + 1), part * whole, key=lambda count: self._removed(plans(count)))
        require(
            count <= len(queue),
            f"blocks {part:g} cannot be reached: at most {self._removed(plans(len(queue))) / whole:.3f} of the blocks' "
            "parameters can go within the floors; lower blocks, min_heads or min_neurons",
        )
        return plans(count)

    def _block_plans(self, heads: Sequence[list[int]], neurons: Sequence[list[int]]) -> list[BlockPlan]:
        """Plans of the blocks from the head units and the neurons that stay; widths are rounded to `multiple_of`."""
        plans = []
        parts = zip(self.record.blocks, self.units, heads, self.neurons, neurons, strict=True)
        for spec, units, kept, layer, stay in parts:
            queries = sorted(head for unit in kept for head in units.heads[unit])
            groups = sorted({head // spec.heads_per_kv for head in queries})
            plans.append(BlockPlan(tuple(queries), tuple(groups), tuple(self._rounded(layer, stay))))
        return plans

    def _rounded(self, layer: Layer, stay: list[int]) -> list[int]:
        """The neurons that stay when the width is the multiple nearest to theirs: no zero unless it is zero already."""
        dense, multiple = total([layer]), self.budget.multiple_of
        if not stay or len(stay) == dense or multiple == 1:
            return stay
        width = min(max(int(len(stay) / multiple + 0.5), 1) * multiple, dense)
        return keep([replace(layer, floor=0)], dense - width, self.order)[0]

    def _removed(self, plans: Sequence[BlockPlan]) -> int:
        """Parameters that go when so much stays."""
        return removed_parameters(zip(self.record.blocks, plans, strict=True), self.record.left_out)


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


# PEFT modules and their ranks


def _plan_sites(record: EstimationRecord, budget: Budget, blocks: list[BlockPlan]) -> dict[str, tuple[int, ...]]:
    """PEFT modules that stay, with the ranks of theirs that stay."""
    alive = [index for index, site in enumerate(record.sites) if _has_layer(site, blocks)]
    require(bool(alive), "every PEFT module sits in a sub-layer that the budget removes; lower the ratios")
    stay = _keep_modules(record, budget, alive)
    scores = record.of_ranks(budget.rank_criterion)
    layers = [Layer("ranks", index, scores[index], budget.min_ranks) for index in stay]
    kept = keep_part(layers, budget.ranks, budget.ranks_scope)
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
    layers = [Layer("modules", block, scores[sites], budget.min_modules) for block, sites in by_block.items()]
    if budget.modules_scope == "global":
        lost = len(allowed) - len(alive)
        kept = keep(layers, min(max(part_of(budget.modules, len(allowed)) - lost, 0), len(alive) - 1))
    else:
        kept = keep_part(layers, budget.modules, "layerwise")
    stay = sorted(sites[unit] for sites, units in zip(by_block.values(), kept, strict=True) for unit in units)
    require(bool(stay), f"modules = {budget.modules:g} layerwise would remove every PEFT module; lower it")
    return stay
