"""Planning: a pure function from scores and settings to a plan; equal records and settings give equal plans.

Heads, neurons and experts of the blocks are selected first, then PEFT modules whose layer remains, then their ranks.
Blocks that are dropped whole were removed before estimation; here they only count as removed parameters.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from lightpeft.config import Light, LightConfig, fill_defaults, light_config
from lightpeft.config.light import Scope
from lightpeft.errors import require
from lightpeft.plans.block_plan import BlockPlan, block_parameters, removed_parameters
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.plans.selection import (
    Layer,
    Order,
    keep,
    keep_part,
    remaining_units,
    removal_order,
    round_share,
    total,
    weakest_first,
)
from lightpeft.plans.structure import FFN_SLOTS, MASKED, BlockSpec, MaskedUnit, SiteSpec

EXPERT_MULTIPLE = 8
"""Widths of experts are multiples of this number: grouped matrix products need rows of multiples of 16 bytes."""


LEAST_HEADS, LEAST_NEURONS = 1, 1
"""Minimum number of head units and of neurons in every layer."""
LEAST_RANKS = 1
"""Minimum number of ranks in every remaining PEFT module."""


def make_plan(record: EstimationRecord, light: Light, order: Order | None = None) -> PrunePlan:
    """Plan the units to keep by their importance scores (Gu et al. 2024, the pruning step).

    With `remove.blocks`, units of all blocks are removed in ascending order of score(u) / parameters(u), until this
    fraction of the blocks' parameters is removed. With shares, exactly `round(share * n)` of n units are removed
    (layerwise: of each layer's n), lowest score first, and among equal scores the higher index first. Only neurons
    inside experts are removed in groups of 8, because the matrix products of experts need such widths.

    Example:
        plan = make_plan(EstimationRecord.load("runs/reviews/estimation"), light=0.4)
        print(plan.summary())

    Args:
        record: scores of the estimation stage.
        light: fraction of the blocks to remove, or settings; unset ones have the defaults for LoRA on a classifier.
        order: replaces ascending scores as the order of removal of heads, neurons and experts; `light` still gives
            the amounts. It is called with the layers that compete, and with a single layer to round its width.

    Returns:
        The plan, which applies to any copy of the base.

    Raises:
        LightPeftError: scores are not finite, a criterion is missing, the amount cannot be removed, or `order` returns
            invalid indices.
    """
    light = fill_defaults(light_config(light))
    record.check_scored(light)
    specs = (*record.blocks, *record.left_out)
    if light.remove.depth == "auto":
        light = _use_measured_depth(light, record)
    too_deep = light.blocks_left(len(specs)) < len(record.blocks)
    gone = f"light.remove.depth {light.remove.depth} drops blocks that were present during estimation"
    require(not too_deep, f"{gone}; estimate again with this depth")
    for spec in record.blocks:
        check_experts(spec, light)
    blocks = _Blocks(record, light, order or weakest_first).stay()
    emptied = not any(block.heads or block.neurons or block.experts for block in blocks)
    require(not emptied, "the budget would remove all heads and all neurons; lower the amounts in light.remove")
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
    """Return the name of the criterion of heads, neurons and experts."""
    return str(light.estimate.criterion)


@dataclass(frozen=True)
class Bundles:
    """The smallest sets of units of a block that can be removed together."""

    members: Tensor
    """Units of each set, [sets, units of one]."""
    scores: Tensor
    """Sum of the scores of each set's units: [sets], float64."""
    parameters: int
    """Number of parameters that are removed with one set."""

    @property
    def size(self) -> int:
        """Number of units of one set."""
        return self.members.shape[1]

    def units(self, sets: Sequence[int]) -> Tensor:
        """Return the units of the sets with these indices, [sets, units of one]."""
        return self.members[torch.tensor(sets, dtype=torch.long)]


def _bundles(members: Tensor, scores: Tensor, parameters: int) -> Bundles:
    return Bundles(members, scores.double()[members].sum(1), parameters)


def head_units(record: EstimationRecord, light: LightConfig) -> list[Bundles]:
    """Return the head units of every block: KV groups, or (balanced) sets of one query head of every group.

    Balanced sets keep all groups equally large. Where every query head has its own KV head, units are single heads.
    """
    result = []
    for spec, scores in zip(record.blocks, record.block_scores("heads", criterion_of(light)), strict=True):
        balanced = light.remove.head_unit == "balanced" and spec.heads_per_kv > 1
        units = balanced_slices(scores, spec.kv_heads) if balanced else _groups(spec)
        parameters = spec.head_parameters * units.shape[1] + (0 if balanced else spec.kv_parameters)
        result.append(_bundles(units, scores, parameters))
    return result


def expert_slices(record: EstimationRecord, criterion: str) -> list[Bundles]:
    """Return sets of one neuron of each expert for every block; a block without experts has none.

    All experts of a layer stay equally wide, because one tensor holds their weights.
    """
    result = []
    for spec, scores in zip(record.blocks, record.block_scores("expert_neurons", criterion), strict=True):
        slices = balanced_slices(scores, spec.experts) if spec.experts else torch.zeros(0, 0, dtype=torch.long)
        result.append(_bundles(slices, scores, spec.expert_neuron_parameters * spec.experts))
    return result


def expert_units(record: EstimationRecord, criterion: str) -> list[Bundles]:
    """Return the units of experts of every block: single experts, or one expert of each group.

    Routers that choose among groups first need equally many experts in each group.
    """
    result = []
    for spec, scores in zip(record.blocks, record.block_scores("experts", criterion), strict=True):
        groups = spec.expert_groups
        units = balanced_slices(scores, groups) if groups > 1 else torch.arange(spec.experts).unsqueeze(1)
        result.append(_bundles(units, scores, spec.expert_parameters * groups))
    return result


def check_experts(spec: BlockSpec, light: LightConfig) -> None:
    """Check that the share of experts to remove leaves a block as many experts as its router needs.

    Raises:
        LightPeftError: too few would remain. (Where experts compete with other units, a floor keeps enough of them.)
    """
    share = light.remove.experts
    if not spec.experts or share is None:
        return
    there, needed = spec.experts // spec.expert_groups, spec.needed_experts // spec.expert_groups
    stay = there - round_share(share, there)
    require(
        stay >= needed,
        f"light.remove.experts {share:g} would leave {stay * spec.expert_groups} of {spec.experts} experts, and "
        f"{spec.needs_experts()}; set it to {math.floor(1000 * (there - needed) / there) / 1000:g} or less",
    )


def check_reachable(blocks: Sequence[BlockSpec], left_out: Sequence[BlockSpec], light: LightConfig) -> None:
    """Check before estimation that `remove.blocks` can be reached, which the structure of the blocks decides alone.

    Args:
        blocks: blocks to estimate.
        left_out: blocks that are dropped whole.

    Raises:
        LightPeftError: every layer keeps some units, and these are more than the amount leaves.
    """
    if light.is_auto:
        return
    name = criterion_of(light)
    scores = {f"{kind}/{name}/{block.index}": torch.zeros(getattr(block, kind)) for kind in MASKED for block in blocks}
    unscored = EstimationRecord([*blocks], [], scores, 0, "", left_out=[*left_out])
    _Blocks(unscored, light, weakest_first).check_reachable()


def _groups(spec: BlockSpec) -> Tensor:
    """Return the query heads of each KV group, [groups, heads of one]."""
    return torch.arange(spec.heads).view(spec.kv_heads, spec.heads_per_kv)


def balanced_slices(scores: Tensor, groups: int) -> Tensor:
    """Form slices of one unit of every group by rank: slice j holds the j-th best unit of each group.

    Args:
        scores: scores of the units of group 0, then of those of group 1, and so on; equally many of each.
        groups: number of groups.

    Returns:
        Units of each slice, in the order of groups: [slices, groups]; the last slices are the weakest.
    """
    ranked = scores.view(groups, -1).sort(dim=1, descending=True, stable=True).indices
    first = torch.arange(groups).unsqueeze(1) * ranked.shape[1]
    return (ranked + first).T


def _use_measured_depth(light: LightConfig, record: EstimationRecord) -> LightConfig:
    """Return the settings with the depth of the estimation, which was measured within the `blocks` of that time."""
    blocks = light.remove.blocks
    within = not isinstance(blocks, float | int) or record.depth <= blocks
    gone = f"light.remove.depth: auto dropped {record.depth:.0%} of the blocks, more than light.remove.blocks {blocks}"
    require(within, f"{gone}; estimate again")
    return light.with_depth(record.depth)


def _split_amounts(light: LightConfig, record: EstimationRecord) -> tuple[float | None, tuple[float, float, float]]:
    """Return the fraction of the blocks for which units compete, or None and the shares of heads, neurons, experts."""
    part, remove = light.known_blocks, light.remove
    if part is None:
        return None, (remove.heads or 0.0, remove.neurons or 0.0, remove.experts or 0.0)
    if remove.scope == "layerwise":
        share = max(0.0, (part - record.depth) / (1 - record.depth))
        return None, (share, share, share)
    return part, (0.0, 0.0, 0.0)


class _Blocks:
    """Heads, neurons and experts of all blocks, and their selection by the settings."""

    def __init__(self, record: EstimationRecord, light: LightConfig, order: Order) -> None:
        self.record, self.order = record, order
        self.scope, multiple = light.remove.scope, light.remove.multiple_of
        self.part, self.shares = _split_amounts(light, record)
        self.multiple = 1 if multiple is None else multiple
        criterion = criterion_of(light)
        self.heads = head_units(record, light)
        self.slices = expert_slices(record, criterion)
        neurons = record.block_scores("neurons", criterion)
        self.experts = expert_units(record, criterion)
        parts = list(zip(record.blocks, self.heads, neurons, self.experts, self.slices, strict=True))
        self.layers: dict[MaskedUnit, list[Layer]] = {
            "heads": [self._bundle_layer("heads", spec, units, LEAST_HEADS) for spec, units, *_ in parts],
            "neurons": [
                self._unit_layer("neurons", spec, scores, LEAST_NEURONS, spec.neuron_parameters)
                for spec, _, scores, *_ in parts
            ],
            "experts": [
                self._bundle_layer("experts", spec, units, spec.needed_experts // spec.expert_groups)
                for spec, _, _, units, _ in parts
            ],
            "expert_neurons": [
                self._bundle_layer("expert_neurons", spec, units, LEAST_NEURONS) for spec, *_, units in parts
            ],
        }

    def _bundle_layer(self, kind: MaskedUnit, spec: BlockSpec, units: Bundles, floor: int) -> Layer:
        """Make a layer of sets of units, ranked by score per parameter where kinds compete, else by mean score."""
        cost = units.size if self.part is None else units.parameters
        return Layer(kind, spec.index, units.scores, floor, cost)

    def _unit_layer(self, kind: MaskedUnit, spec: BlockSpec, scores: Tensor, floor: int, parameters: int) -> Layer:
        """Make a layer of single units, ranked by score per parameter where kinds compete, else by score."""
        return Layer(kind, spec.index, scores, floor, 1 if self.part is None else parameters)

    def stay(self) -> list[BlockPlan]:
        """Select the units of each block to keep."""
        return self._select_by_shares() if self.part is None else self._select_by_cost(self.part)

    def _select_by_shares(self) -> list[BlockPlan]:
        """Select units by the shares of heads, neurons and experts to remove."""
        heads, neurons, experts = self.shares
        how: dict[MaskedUnit, tuple[float, Scope]] = {
            "heads": (heads, self.scope or "layerwise"),
            "neurons": (neurons, self.scope or "global"),
            "experts": (experts, "layerwise"),
            "expert_neurons": (neurons, self.scope or "global"),
        }
        return self._block_plans({kind: keep_part(self.layers[kind], *part, self.order) for kind, part in how.items()})

    def _select_by_cost(self, part: float) -> list[BlockPlan]:
        """Select units of all blocks by score per parameter, lowest first, until `part` of the parameters is removed.

        With Fisher scores this minimizes the second-order estimate of the loss without interactions of units: removing
        unit i adds about F_i / 2 to the loss, so the criterion is F_i divided by the parameters of the unit.
        """
        layers = [layer for kind in MASKED for layer in self.layers[kind]]
        queue = removal_order(layers, self.order)

        def plans(count: int) -> list[BlockPlan]:
            kept, blocks = remaining_units(layers, queue[:count]), len(self.record.blocks)
            return self._block_plans({kind: kept[i * blocks : (i + 1) * blocks] for i, kind in enumerate(MASKED)})

        self._require_reachable(part, plans(len(queue)))
        # counted in whole plans, because KV heads go with their last query head, and widths are rounded
        wanted = part * self._parameters
        return plans(bisect_left(range(len(queue)), wanted, key=lambda count: self._count_removed(plans(count))))

    def check_reachable(self) -> None:
        """Check that the fraction of the blocks to remove leaves every layer its least units, whatever the scores."""
        if self.part is not None:
            fewest = {
                kind: [list(range(min(layer.floor, len(layer.scores)))) for layer in layers]
                for kind, layers in self.layers.items()
            }
            self._require_reachable(self.part, self._block_plans(fewest))

    def _require_reachable(self, part: float, fewest: Sequence[BlockPlan]) -> None:
        """Raise `LightPeftError` unless the plans that keep as little as possible remove `part` of the blocks."""
        most = self._count_removed(fewest)
        require(
            most >= part * self._parameters,
            f"light.remove.blocks {part:g} cannot be reached: every layer keeps some units, so at most "
            f"{most / self._parameters:.3f} of the blocks' parameters can be removed; lower it",
        )

    @property
    def _parameters(self) -> int:
        """Parameters of all blocks, dropped ones included."""
        return sum(block_parameters(spec) for spec in (*self.record.blocks, *self.record.left_out))

    def _block_plans(self, kept: Mapping[MaskedUnit, Sequence[list[int]]]) -> list[BlockPlan]:
        """Make the plans of the blocks from the sets and units to keep; widths are rounded to `multiple_of`."""
        plans = []
        for place, spec in enumerate(self.record.blocks):
            queries = self.heads[place].units(kept["heads"][place]).flatten().sort().values.tolist()
            groups = sorted({head // spec.heads_per_kv for head in queries})
            neurons = self._round_width(self.layers["neurons"][place], kept["neurons"][place], self.multiple)
            experts = self.experts[place].units(kept["experts"][place]).flatten().sort().values.tolist()
            inside = self._neurons_inside(place, kept["expert_neurons"][place], experts)
            plans.append(BlockPlan(tuple(queries), tuple(groups), tuple(neurons), tuple(experts), tuple(inside)))
        return plans

    def _neurons_inside(self, place: int, slices: list[int], experts: list[int]) -> list[int]:
        """Return the neurons of the slices to keep that belong to experts to keep."""
        multiple = math.lcm(self.multiple, EXPERT_MULTIPLE)
        stay = self._round_width(self.layers["expert_neurons"][place], slices, multiple)
        neurons: list[int] = self.slices[place].units(stay)[:, experts].flatten().sort().values.tolist()
        return neurons

    def _round_width(self, layer: Layer, stay: list[int], multiple: int) -> list[int]:
        """Select the neurons to keep at the width nearest to theirs that is a multiple, and zero only if theirs is."""
        dense = total([layer])
        if not stay or len(stay) == dense or multiple == 1:
            return stay
        width = min(max(int(len(stay) / multiple + 0.5), 1) * multiple, dense)
        return keep([replace(layer, floor=0)], dense - width, self.order)[0]

    def _count_removed(self, plans: Sequence[BlockPlan]) -> int:
        """Count the parameters that these plans remove."""
        return removed_parameters(zip(self.record.blocks, plans, strict=True), self.record.left_out)


# PEFT modules and their ranks


def _plan_sites(record: EstimationRecord, light: LightConfig, blocks: list[BlockPlan]) -> dict[str, tuple[int, ...]]:
    """Select the PEFT modules to keep: name -> the ranks to keep."""
    alive = [index for index, site in enumerate(record.sites) if _has_layer(site, blocks)]
    require(bool(alive), "every PEFT module sits in a sub-layer that is removed; lower the amounts in light.remove")
    stay = _keep_modules(record, light, alive)
    scores = record.rank_scores(str(light.estimate.rank_criterion))
    layers = [Layer("ranks", index, scores[index], LEAST_RANKS) for index in stay]
    kept = keep_part(layers, light.modules.remove_ranks or 0.0, "layerwise")
    return {record.sites[index].name: tuple(ranks) for index, ranks in zip(stay, kept, strict=True)}


def _has_layer(site: SiteSpec, blocks: list[BlockPlan]) -> bool:
    """Return whether the plans keep the sub-layer that holds the PEFT module."""
    if site.block is None or site.slot is None:
        return True
    block = blocks[site.block]
    return bool(block.neurons if site.slot in FFN_SLOTS else block.heads)


def _keep_modules(record: EstimationRecord, light: LightConfig, alive: list[int]) -> list[int]:
    """Select the indices of the PEFT modules to keep, at least one; modules of removed sub-layers count as removed."""
    scores = record.module_scores(str(light.estimate.module_criterion))
    lowest = light.first_module_block(len(record.blocks))
    allowed = {index for index, site in enumerate(record.sites) if site.block is None or site.block >= lowest}
    alive = [index for index in alive if index in allowed]
    lower = "raise it, or lower the amounts in light.remove"
    require(bool(alive), f"no PEFT module remains in the blocks that light.modules.blocks allows; {lower}")
    by_block: dict[int | None, list[int]] = {}
    for index in alive:
        by_block.setdefault(record.sites[index].block, []).append(index)
    layers = [Layer("modules", block, scores[sites], 0) for block, sites in by_block.items()]
    lost = len(allowed) - len(alive)
    wanted = round_share(light.modules.remove or 0.0, len(allowed)) - lost
    kept = keep(layers, min(max(wanted, 0), len(alive) - 1))
    return sorted(sites[unit] for sites, units in zip(by_block.values(), kept, strict=True) for unit in units)
