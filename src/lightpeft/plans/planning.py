"""From scores and settings to a plan: a pure function, so the same record and settings always give the same plan.

Heads, neurons and experts of the blocks are selected first, then PEFT modules among those whose layer is still there,
then their ranks. Blocks that are left out whole have gone before: they only count.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from lightpeft.config import Light, LightConfig, derived, light_config
from lightpeft.config.light import Scope
from lightpeft.errors import require
from lightpeft.plans.records import BlockPlan, EstimationRecord, PrunePlan, block_parameters, removed_parameters
from lightpeft.plans.selection import Layer, Order, going, keep, keep_part, part_of, total, weakest_first, without
from lightpeft.plans.structure import FFN_SLOTS, MASKED, BlockSpec, MaskedUnit, SiteSpec

EXPERT_MULTIPLE = 8
"""Widths of experts are multiples of it: grouped matrix products take rows of multiples of 16 bytes."""


LEAST_HEADS, LEAST_NEURONS = 1, 1
"""Head units and neurons that stay in every layer."""
LEAST_RANKS = 1
"""Ranks that stay in every PEFT module that stays."""


def make_plan(record: EstimationRecord, light: Light, order: Order | None = None) -> PrunePlan:
    """Decide which units stay.

    Counts are exact: of n units, `round(share * n)` go (layerwise: of each layer's n), lowest score first, and among
    equal scores the higher index first. Only neurons inside experts go in eights, because the matrix products of
    experts take no other widths.

    Args:
        light: part of the blocks to remove, or settings; what is unset in them is what it is for LoRA on a model that
            classifies.
        order: in which heads, neurons and experts go instead; how many is still what `light` says. It is asked
            for the layers that compete, and for a layer alone where its width is rounded.

    Raises:
        LightPeftError: scores that are not finite, a missing criterion, an amount that cannot go, or an `order` that
            is not one of the units.
    """
    light = derived(light_config(light))
    record.check_scored(light)
    specs = (*record.blocks, *record.left_out)
    if light.remove.depth == "auto":
        light = _with_found_depth(light, record)
    too_deep = light.blocks_left(len(specs)) < len(record.blocks)
    gone = f"depth {light.remove.depth} leaves out blocks that the estimation had"
    require(not too_deep, f"{gone}; estimate with this depth")
    for spec in record.blocks:
        check_experts(spec, light)
    blocks = _Blocks(record, light, order or weakest_first).stay()
    emptied = not any(block.heads or block.neurons or block.experts for block in blocks)
    require(not emptied, "the budget would empty the model: no head and no neuron would stay; lower the amounts")
    sites = _plan_sites(record, light, blocks)
    return PrunePlan(
        specs=specs,
        blocks=tuple(blocks),
        sites=sites,
        dense_sites=tuple(record.sites),
        base_parameters=record.base_parameters,
        fingerprint=record.fingerprint,
        budget=asdict(light),
        train=light.train or "peft",
    )


# Heads, neurons and experts


def criterion_of(light: LightConfig) -> str:
    """Which score ranks heads, neurons and experts."""
    return str(light.estimate.criterion)


@dataclass(frozen=True)
class Bundles:
    """The smallest sets of some units of a block that can go together."""

    members: Tensor
    """The units of each set, [sets, units of one]."""
    scores: Tensor
    """Their scores, added up: [sets], float64."""
    parameters: int
    """What one set takes with it."""

    @property
    def size(self) -> int:
        """Units of one set."""
        return self.members.shape[1]

    def units(self, sets: Sequence[int]) -> Tensor:
        """The units of some sets, [sets, units of one]."""
        return self.members[torch.tensor(sets, dtype=torch.long)]


def _bundles(members: Tensor, scores: Tensor, parameters: int) -> Bundles:
    return Bundles(members, scores.double()[members].sum(1), parameters)


def head_units(record: EstimationRecord, light: LightConfig) -> list[Bundles]:
    """The head units of every block: KV groups, or (balanced) one query head of every group, so that all groups stay
    equally large. Where every query head has its own KV head, both are single heads."""
    result = []
    for spec, scores in zip(record.blocks, record.of_blocks("heads", criterion_of(light)), strict=True):
        balanced = light.remove.head_unit == "balanced" and spec.heads_per_kv > 1
        units = balanced_slices(scores, spec.kv_heads) if balanced else _groups(spec)
        parameters = spec.head_parameters * units.shape[1] + (0 if balanced else spec.kv_parameters)
        result.append(_bundles(units, scores, parameters))
    return result


def expert_slices(record: EstimationRecord, criterion: str) -> list[Bundles]:
    """Of every block with experts, sets of one neuron of each expert: weights of experts lie in one tensor, so that all
    stay equally wide."""
    result = []
    for spec, scores in zip(record.blocks, record.of_blocks("expert_neurons", criterion), strict=True):
        slices = balanced_slices(scores, spec.experts) if spec.experts else torch.zeros(0, 0, dtype=torch.long)
        result.append(_bundles(slices, scores, spec.expert_neuron_parameters * spec.experts))
    return result


def expert_units(record: EstimationRecord, criterion: str) -> list[Bundles]:
    """Of every block with experts, these one by one; or one of each group, where a router chooses among groups first,
    which all have equally many."""
    result = []
    for spec, scores in zip(record.blocks, record.of_blocks("experts", criterion), strict=True):
        groups = spec.expert_groups
        units = balanced_slices(scores, groups) if groups > 1 else torch.arange(spec.experts).unsqueeze(1)
        result.append(_bundles(units, scores, spec.expert_parameters * groups))
    return result


def check_experts(spec: BlockSpec, light: LightConfig) -> None:
    """Refuse a share that leaves a block fewer experts than its router needs.

    Raises:
        LightPeftError: it does; where experts compete with other units, enough of them stay anyway.
    """
    share = light.remove.experts
    if not spec.experts or share is None:
        return
    there, needed = spec.experts // spec.expert_groups, spec.needed_experts // spec.expert_groups
    stay = there - part_of(share, there)
    require(
        stay >= needed,
        f"experts {share:g} would leave {stay * spec.expert_groups} of {spec.experts} experts, and "
        f"{spec.needs_experts()}; set light.remove.experts to {math.floor(1000 * (there - needed) / there) / 1000:g} "
        "or less",
    )


def _groups(spec: BlockSpec) -> Tensor:
    """The query heads of each KV group, [groups, heads of one]."""
    return torch.arange(spec.heads).view(spec.kv_heads, spec.heads_per_kv)


def balanced_slices(scores: Tensor, groups: int) -> Tensor:
    """Slice j holds the j-th best unit of every group, so that removing slices from the end removes the weakest.

    Args:
        scores: of the units of group 0, then of those of group 1, and so on; equally many of each.

    Returns:
        Units of each slice, in the order of groups: [slices, groups].
    """
    ranked = scores.view(groups, -1).sort(dim=1, descending=True, stable=True).indices
    first = torch.arange(groups).unsqueeze(1) * ranked.shape[1]
    return (ranked + first).T


def _with_found_depth(light: LightConfig, record: EstimationRecord) -> LightConfig:
    """The settings with the depth that the estimation had, which was found as far as `blocks` allowed then."""
    blocks = light.remove.blocks
    within = not isinstance(blocks, float | int) or record.depth <= blocks
    gone = f"depth: auto left out {record.depth:.0%} of the blocks, and blocks is {blocks} now"
    require(within, f"{gone}; estimate again")
    return light.with_depth(record.depth)


def _amounts(light: LightConfig, record: EstimationRecord) -> tuple[float | None, tuple[float, float, float]]:
    """The part of all blocks for which units compete, or else (None) the shares of heads, neurons and experts."""
    part, remove = light.known_blocks, light.remove
    if part is None:
        return None, (remove.heads or 0.0, remove.neurons or 0.0, remove.experts or 0.0)
    if remove.scope == "layerwise":
        share = max(0.0, (part - record.depth) / (1 - record.depth))
        return None, (share, share, share)
    return part, (0.0, 0.0, 0.0)


class _Blocks:
    """Heads, neurons and experts of all blocks, and what the settings keep of them."""

    def __init__(self, record: EstimationRecord, light: LightConfig, order: Order) -> None:
        self.record, self.order = record, order
        self.scope, multiple = light.remove.scope, light.remove.multiple_of
        self.part, self.shares = _amounts(light, record)
        self.multiple = 1 if multiple is None else multiple
        criterion = criterion_of(light)
        self.heads = head_units(record, light)
        self.slices = expert_slices(record, criterion)
        neurons = record.of_blocks("neurons", criterion)
        self.experts = expert_units(record, criterion)
        parts = list(zip(record.blocks, self.heads, neurons, self.experts, self.slices, strict=True))
        self.layers: dict[MaskedUnit, list[Layer]] = {
            "heads": [self._bundled("heads", spec, units, LEAST_HEADS) for spec, units, *_ in parts],
            "neurons": [
                self._single("neurons", spec, scores, LEAST_NEURONS, spec.neuron_parameters)
                for spec, _, scores, *_ in parts
            ],
            "experts": [
                self._bundled("experts", spec, units, spec.needed_experts // spec.expert_groups)
                for spec, _, _, units, _ in parts
            ],
            "expert_neurons": [
                self._bundled("expert_neurons", spec, units, max(LEAST_NEURONS, 1)) for spec, *_, units in parts
            ],
        }

    def _bundled(self, kind: MaskedUnit, spec: BlockSpec, units: Bundles, floor: int) -> Layer:
        """Sets of units by score per parameter where they compete with others, else by the mean of their units."""
        cost = units.size if self.part is None else units.parameters
        return Layer(kind, spec.index, units.scores, floor, cost)

    def _single(self, kind: MaskedUnit, spec: BlockSpec, scores: Tensor, floor: int, parameters: int) -> Layer:
        """Units by score per parameter where they compete with others, else by score."""
        return Layer(kind, spec.index, scores, floor, 1 if self.part is None else parameters)

    def stay(self) -> list[BlockPlan]:
        """What stays of each block."""
        return self._by_shares() if self.part is None else self._by_cost(self.part)

    def _by_shares(self) -> list[BlockPlan]:
        """These shares of heads, neurons and experts go."""
        heads, neurons, experts = self.shares
        how: dict[MaskedUnit, tuple[float, Scope]] = {
            "heads": (heads, self.scope or "layerwise"),
            "neurons": (neurons, self.scope or "global"),
            "experts": (experts, "layerwise"),
            "expert_neurons": (neurons, self.scope or "global"),
        }
        return self._block_plans({kind: keep_part(self.layers[kind], *part, self.order) for kind, part in how.items()})

    def _by_cost(self, part: float) -> list[BlockPlan]:
        """Units of all blocks compete: the lowest score per parameter goes first, until `part` of all goes.

        With Fisher scores that is the set whose removal costs least by the second-order estimate of the loss in which
        units do not interact: removing unit i adds about F_i / 2, so what counts is F_i by what the unit costs to keep.
        """
        layers = [layer for kind in MASKED for layer in self.layers[kind]]
        queue = going(layers, self.order)
        whole = sum(block_parameters(spec) for spec in (*self.record.blocks, *self.record.left_out))

        def plans(count: int) -> list[BlockPlan]:
            kept, blocks = without(layers, queue[:count]), len(self.record.blocks)
            return self._block_plans({kind: kept[i * blocks : (i + 1) * blocks] for i, kind in enumerate(MASKED)})

        # counted in whole plans, because KV heads go with their last query head, and widths are rounded
        count = bisect_left(range(len(queue) + 1), part * whole, key=lambda count: self._removed(plans(count)))
        require(
            count <= len(queue),
            f"blocks {part:g} cannot be reached: at most {self._removed(plans(len(queue))) / whole:.3f} of the blocks' "
            "parameters can go, since every layer keeps some; lower light.remove.blocks",
        )
        return plans(count)

    def _block_plans(self, kept: Mapping[MaskedUnit, Sequence[list[int]]]) -> list[BlockPlan]:
        """Plans of the blocks from the sets and units that stay; widths are rounded to `multiple_of`."""
        plans = []
        for place, spec in enumerate(self.record.blocks):
            queries = self.heads[place].units(kept["heads"][place]).flatten().sort().values.tolist()
            groups = sorted({head // spec.heads_per_kv for head in queries})
            neurons = self._rounded(self.layers["neurons"][place], kept["neurons"][place], self.multiple)
            experts = self.experts[place].units(kept["experts"][place]).flatten().sort().values.tolist()
            inside = self._neurons_inside(place, kept["expert_neurons"][place], experts)
            plans.append(BlockPlan(tuple(queries), tuple(groups), tuple(neurons), tuple(experts), tuple(inside)))
        return plans

    def _neurons_inside(self, place: int, slices: list[int], experts: list[int]) -> list[int]:
        """The neurons of these slices that belong to experts that stay."""
        multiple = math.lcm(self.multiple, EXPERT_MULTIPLE)
        stay = self._rounded(self.layers["expert_neurons"][place], slices, multiple)
        neurons: list[int] = self.slices[place].units(stay)[:, experts].flatten().sort().values.tolist()
        return neurons

    def _rounded(self, layer: Layer, stay: list[int], multiple: int) -> list[int]:
        """The neurons that stay when the width is the multiple nearest to theirs: no zero unless it is zero already."""
        dense = total([layer])
        if not stay or len(stay) == dense or multiple == 1:
            return stay
        width = min(max(int(len(stay) / multiple + 0.5), 1) * multiple, dense)
        return keep([replace(layer, floor=0)], dense - width, self.order)[0]

    def _removed(self, plans: Sequence[BlockPlan]) -> int:
        """Parameters that go when so much stays."""
        return removed_parameters(zip(self.record.blocks, plans, strict=True), self.record.left_out)


# PEFT modules and their ranks


def _plan_sites(record: EstimationRecord, light: LightConfig, blocks: list[BlockPlan]) -> dict[str, tuple[int, ...]]:
    """PEFT modules that stay, with the ranks of theirs that stay."""
    alive = [index for index, site in enumerate(record.sites) if _has_layer(site, blocks)]
    require(bool(alive), "every PEFT module sits in a sub-layer that goes; lower the amounts")
    stay = _keep_modules(record, light, alive)
    scores = record.of_ranks(str(light.estimate.rank_criterion))
    layers = [Layer("ranks", index, scores[index], LEAST_RANKS) for index in stay]
    kept = keep_part(layers, light.modules.remove_ranks or 0.0, "layerwise")
    return {record.sites[index].name: tuple(ranks) for index, ranks in zip(stay, kept, strict=True)}


def _has_layer(site: SiteSpec, blocks: list[BlockPlan]) -> bool:
    """Whether the sub-layer that holds the site is still there."""
    if site.block is None or site.slot is None:
        return True
    block = blocks[site.block]
    return bool(block.neurons if site.slot in FFN_SLOTS else block.heads)


def _keep_modules(record: EstimationRecord, light: LightConfig, alive: list[int]) -> list[int]:
    """Indices of the sites that stay. Sites whose sub-layer went count as removed; one site always stays."""
    scores = record.of_modules(str(light.estimate.module_criterion))
    lowest = light.first_module_block(len(record.blocks))
    allowed = {index for index, site in enumerate(record.sites) if site.block is None or site.block >= lowest}
    alive = [index for index in alive if index in allowed]
    lower = "raise it, or lower the amounts"
    require(bool(alive), f"no PEFT module sits in the blocks that light.modules.blocks allows; {lower}")
    by_block: dict[int | None, list[int]] = {}
    for index in alive:
        by_block.setdefault(record.sites[index].block, []).append(index)
    layers = [Layer("modules", block, scores[sites], 0) for block, sites in by_block.items()]
    lost = len(allowed) - len(alive)
    wanted = part_of(light.modules.remove or 0.0, len(allowed)) - lost
    kept = keep(layers, min(max(wanted, 0), len(alive) - 1))
    return sorted(sites[unit] for sites, units in zip(by_block.values(), kept, strict=True) for unit in units)
