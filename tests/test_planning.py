"""Plans: exact counts, floors, ties, scopes, targets, as properties over random records and budgets."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lights import light_of
from strategies import half_up, ratios, scopes
from tiny import plan_of, refusal
from torch import Tensor

from lightpeft.errors import LightPeftError
from lightpeft.plans.block_plan import block_parameters, removed_in_block
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.planning import check_reachable, make_plan
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.plans.selection import Layer, weakest_first
from lightpeft.plans.structure import BlockSpec, SiteSpec

PROJECTIONS = {slot: slot for slot in ("q", "k", "v", "o", "ffn_in", "ffn_out")}


def make_record(
    layers: int = 3,
    groups: int = 2,
    per_group: int = 2,
    neurons: int = 12,
    rank: int = 4,
    seed: int = 0,
    ties: int = 0,
    left_out: int = 0,
) -> EstimationRecord:
    """A record without a model; `ties`: scores are whole numbers below it; `left_out`: blocks above the scored ones."""
    specs = [
        BlockSpec(index, "attention", PROJECTIONS, groups * per_group, groups, 8, neurons, 500, 400, 65)
        for index in range(layers + left_out)
    ]
    blocks, above = specs[:layers], specs[layers:]
    sites = [SiteSpec(f"{index}.{slot}", rank, index, slot) for index in range(layers) for slot in PROJECTIONS]
    generator = torch.Generator().manual_seed(seed)

    def scores(count: int) -> Tensor:
        if ties:
            return torch.randint(0, ties, (count,), generator=generator).float()
        return torch.rand(count, generator=generator)

    values = {f"heads/mask/{index}": scores(groups * per_group) for index in range(layers)}
    values |= {f"neurons/mask/{index}": scores(neurons) for index in range(layers)}
    values |= {f"ranks/taylor/{index}": scores(rank) for index in range(len(sites))}
    values["modules/ratio"] = scores(len(sites))
    dense = len(specs) * (groups * per_group * 500 + groups * 400 + neurons * 65)
    return EstimationRecord(blocks, sites, values, base_parameters=2 * dense, fingerprint="f", left_out=above)


records = st.builds(
    make_record,
    layers=st.integers(1, 4),
    groups=st.integers(1, 4),
    per_group=st.integers(1, 4),
    neurons=st.integers(1, 24),
    rank=st.integers(1, 6),
    seed=st.integers(0, 1000),
    ties=st.sampled_from([0, 1, 3]),
    left_out=st.sampled_from([0, 0, 1, 2]),
)
budgets = st.fixed_dictionaries(
    {
        "heads": ratios,
        "neurons": ratios,
        "modules": ratios,
        "ranks": ratios,
        "scope": scopes,
        "module_blocks": st.sampled_from([1.0, 1.0, 0.5, 1 / 3, 0.01]),
        "min_heads": st.integers(0, 2),
        "min_neurons": st.integers(0, 3),
        "multiple_of": st.sampled_from([1, 1, 4, 8]),
        "head_unit": st.sampled_from(["group", "balanced"]),
    }
)


def plan_or_skip(record: EstimationRecord, budget: dict[str, Any]) -> PrunePlan:
    """The plan; budgets that empty the model are another test's."""
    try:
        return plan_of(record, **budget)
    except LightPeftError as error:
        assert "lower" in str(error)
        assume(False)
        raise


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("key", "what"),
    [("heads/mask/1", "head"), ("neurons/mask/0", "neurons"), ("modules/ratio", "modules"), ("ranks/taylor/0", "rank")],
)
def test_scores_that_are_not_finite(key: str, what: str, value: float) -> None:
    record = make_record()
    record.scores[key] = record.scores[key].clone()
    record.scores[key][1] = value
    with pytest.raises(LightPeftError, match=f"{what}.* not finite") as error:
        make_plan(record, light_of(modules=0.0))
    assert "\n" not in str(error.value)


# Whole plans


@settings(deadline=None)
@given(record=records, budget=budgets)
def test_a_plan_is_a_pure_function(record: EstimationRecord, budget: dict[str, Any]) -> None:
    before = copy.deepcopy(record)
    plan = plan_or_skip(record, budget)
    assert plan == plan_of(copy.deepcopy(record), **budget)
    assert (record.blocks, record.sites, record.meta) == (before.blocks, before.sites, before.meta)
    assert record.scores.keys() == before.scores.keys()
    assert all(value.equal(before.scores[key]) for key, value in record.scores.items())
    assert PrunePlan.from_dict(plan.to_dict()) == plan


@settings(deadline=None)
@given(record=records, budget=budgets)
def test_what_every_plan_satisfies(record: EstimationRecord, budget: dict[str, Any]) -> None:
    plan = plan_or_skip(record, budget)
    assert (plan.base_parameters, plan.fingerprint) == (record.base_parameters, record.fingerprint)
    assert 0 <= plan.removed_parameters <= plan.base_parameters
    for spec, kept in plan.parts:
        size = spec.heads_per_kv
        by_group = [[head for head in kept.heads if head // size == group] for group in range(spec.kv_heads)]
        assert kept.kv_heads == tuple(group for group, heads in enumerate(by_group) if heads)
        counts = {len(heads) for heads in by_group if heads}
        assert len(counts) <= 1, "groups that stay are equally large"
        whole_groups = budget["head_unit"] == "group" or size == 1
        units = spec.kv_heads if whole_groups else size
        if whole_groups:
            assert counts <= {size}
            assert len(kept.kv_heads) >= min(budget["min_heads"], units)
        else:
            assert len(kept.kv_heads) in (0, spec.kv_heads)
            assert len(kept.heads) // spec.kv_heads >= min(budget["min_heads"], units)
        for indices, dense in ((kept.heads, spec.heads), (kept.neurons, spec.neurons)):
            assert list(indices) == sorted(set(indices)) and all(0 <= index < dense for index in indices)
        multiple = budget["multiple_of"]
        assert len(kept.neurons) % multiple == 0 or len(kept.neurons) == spec.neurons
        if multiple == 1:
            assert len(kept.neurons) >= min(budget["min_neurons"], spec.neurons)
        assert kept.neurons or budget["min_neurons"] == 0
    check_sites(plan, budget)


def check_sites(plan: PrunePlan, budget: dict[str, Any]) -> None:
    lowest = len(plan.blocks) - max(half_up(budget["module_blocks"] * len(plan.blocks)), 1)
    dense = {site.name: site for site in plan.dense_sites if site.block >= lowest}
    alive = [s for s in dense.values() if getattr(plan.blocks[s.block], "neurons" if "ffn" in s.slot else "heads")]
    assert plan.sites and set(plan.sites) <= {site.name for site in alive}
    removed = half_up(budget["modules"] * len(dense))
    assert len(plan.sites) == max(min(len(dense) - removed, len(alive)), 1)
    for name, ranks in plan.sites.items():
        assert list(ranks) == sorted(set(ranks)) and set(ranks) <= set(range(dense[name].rank))
        assert len(ranks) == max(dense[name].rank - half_up(budget["ranks"] * dense[name].rank), 1)


@given(record=records)
def test_ratio_zero_keeps_all(record: EstimationRecord) -> None:
    plan = make_plan(record, light_of(heads=0, neurons=0, modules=0, ranks=0, multiple_of=8))
    assert plan.removed_parameters == of_left_out(plan)
    assert plan.sites == {site.name: tuple(range(site.rank)) for site in record.sites}


def test_group_units_by_their_mean() -> None:
    record = make_record(layers=1, groups=3, per_group=2)
    record.scores["heads/mask/0"] = torch.tensor([0.0, 0.9, 0.4, 0.4, 0.5, 0.6])
    plan = make_plan(record, light_of(heads=1 / 3, head_unit="group"))
    assert plan.blocks[0].heads == (0, 1, 4, 5) and plan.blocks[0].kv_heads == (0, 2)


def test_balanced_keeps_the_best_of_every_group() -> None:
    record = make_record(layers=1, groups=2, per_group=3)
    record.scores["heads/mask/0"] = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.7, 0.2])
    plan = make_plan(record, light_of(heads=1 / 3, head_unit="balanced"))
    assert plan.blocks[0].heads == (1, 2, 3, 4) and plan.blocks[0].kv_heads == (0, 1)
    plan = make_plan(record, light_of(heads=2 / 3, head_unit="balanced"))
    assert plan.blocks[0].heads == (1, 3), "equal scores: the lower index stays"


@pytest.mark.parametrize(("multiple", "width"), [(1, 7), (2, 8), (4, 8), (5, 5), (8, 8), (16, 12)])
def test_multiple_of_rounds_to_the_nearest(multiple: int, width: int) -> None:
    record = make_record(layers=1, neurons=12)
    scores = record.scores["neurons/mask/0"]
    budget = light_of(heads=0, neurons=5 / 12, multiple_of=multiple)
    kept = make_plan(record, budget).blocks[0].neurons
    assert kept == tuple(sorted(scores.argsort(descending=True)[:width].tolist()))


def test_sites_of_dropped_sublayers_count_as_removed() -> None:
    record = make_record(layers=2)
    record.scores["heads/mask/0"] = torch.zeros(4)
    record.scores["modules/ratio"] = torch.arange(12.0).flip(0)  # those of the dropped attention are the best
    plan = plan_of(record, min_heads=0, heads=0.5, scope="global", modules=0.5, ranks=0)
    assert not plan.blocks[0].heads
    assert list(plan.sites) == ["0.ffn_in", "0.ffn_out", "1.q", "1.k", "1.v", "1.o"]


def test_modules_in_the_upper_blocks() -> None:
    record = make_record(layers=4)
    record.scores["modules/ratio"] = torch.arange(24.0).flip(0)  # those of the lowest blocks are the best
    plan = make_plan(record, light_of(module_blocks=0.5, modules=0.25))
    assert list(plan.sites) == [f"2.{slot}" for slot in PROJECTIONS] + ["3.q", "3.k", "3.v"]
    assert {name.partition(".")[0] for name in make_plan(record, light_of(module_blocks=0.01)).sites} == {"3"}
    lower = make_record(layers=4)
    lower.sites = lower.sites[:12]
    with pytest.raises(LightPeftError, match="no PEFT module remains in the blocks that light.modules.blocks allows"):
        make_plan(lower, light_of(module_blocks=0.5))


def test_a_budget_that_empties_the_model() -> None:
    record = make_record()
    with pytest.raises(LightPeftError, match="would remove all heads and all neurons; lower the amounts"):
        plan_of(record, min_heads=0, min_neurons=0, heads=0.999, neurons=0.999)


def test_every_module_in_a_dropped_sublayer() -> None:
    record = make_record()
    record.sites = [site for site in record.sites if site.slot == "q"]
    record.scores["modules/ratio"] = torch.ones(3)
    with pytest.raises(LightPeftError, match="every PEFT module sits in a sub-layer that is removed"):
        plan_of(record, min_heads=0, heads=0.999)


@pytest.mark.parametrize("field", ["criterion", "module_criterion", "rank_criterion"])
def test_a_criterion_that_was_not_recorded(field: str) -> None:
    with pytest.raises(LightPeftError, match='no scores "[a-z]+/random.*choose one of heads/mask, modules/ratio'):
        make_plan(make_record(), light_of(**{field: "random"}))


# Another order of heads and neurons


def strongest_first(layers: Sequence[Layer]) -> Tensor:
    return weakest_first(layers).flip(0)


@settings(deadline=None)
@given(record=records, budget=budgets)
def test_another_order_takes_other_units_and_as_many(record: EstimationRecord, budget: dict[str, Any]) -> None:
    budget |= {"scope": "layerwise"}
    plan = plan_or_skip(record, budget)
    assert plan_of(record, weakest_first, **budget) == plan
    other = plan_of(record, strongest_first, **budget)
    assert plan.removed_parameters == other.removed_parameters
    for spec, usual, kept in zip(record.blocks, plan.blocks, other.blocks, strict=True):
        assert (len(usual.heads), len(usual.neurons)) == (len(kept.heads), len(kept.neurons))
        scores = record.scores[f"neurons/mask/{spec.index}"]
        gone = sorted(set(range(spec.neurons)) - set(kept.neurons))
        assert all(scores[unit] >= scores[stays] for unit in gone for stays in kept.neurons), "also where it is rounded"


def test_an_order_says_what_goes_first_wherever_it_lies() -> None:
    """By a rule that no score can tell: all neurons from the last block down before any head."""
    record = make_record(layers=3, neurons=12)

    def from_the_top(layers: Sequence[Layer]) -> Tensor:
        places = [(layer.kind == "heads", -(layer.index or 0)) for layer in layers for _ in layer.scores]
        return torch.tensor(sorted(range(len(places)), key=lambda unit: places[unit]))

    whole = sum(block_parameters(spec) for spec in record.blocks)
    plan = make_plan(record, light_of(blocks=17 * 65 / whole, modules=0, ranks=0), from_the_top)
    assert [len(kept.neurons) for kept in plan.blocks] == [12, 6, 1], "one stays: the floor"
    assert all(len(kept.heads) == spec.heads for spec, kept in plan.parts)
    assert plan.sites == make_plan(record, light_of(heads=0, neurons=0, modules=0, ranks=0)).sites


def test_an_order_that_is_none_is_refused() -> None:
    with pytest.raises(LightPeftError, match="order returned invalid unit indices"):
        make_plan(make_record(), light_of(), lambda layers: torch.zeros(2, dtype=torch.int64))


# Heads against neurons


def of_left_out(plan: PrunePlan) -> int:
    """Parameters of the blocks that the plan leaves out whole."""
    return sum(block_parameters(spec) for spec in plan.specs[len(plan.blocks) :])


def part_removed(plan: PrunePlan) -> float:
    whole = sum(block_parameters(spec) for spec in plan.specs)
    return (sum(removed_in_block(spec, kept) for spec, kept in plan.parts) + of_left_out(plan)) / whole


blocks_budgets = st.fixed_dictionaries(
    {
        "blocks": st.sampled_from([0.0, 0.2, 0.4, 0.5, 0.7]),
        "head_unit": st.sampled_from(["group", "balanced"]),
        "multiple_of": st.sampled_from([1, 1, 4, 8]),
        "min_heads": st.integers(0, 2),
        "min_neurons": st.integers(0, 3),
        "modules": st.just(0.0),
        "ranks": st.just(0.0),
    }
)


@given(record=records, budget=blocks_budgets, fixed=st.sampled_from([0, 100]))
def test_blocks_is_the_part_of_the_blocks_that_goes(
    record: EstimationRecord, budget: dict[str, Any], fixed: int
) -> None:
    """Measured on the plan: keys and values, rounded widths and what no plan reaches are all counted."""
    record.blocks = [replace(spec, fixed_parameters=fixed) for spec in record.blocks]
    record.left_out = [replace(spec, fixed_parameters=fixed) for spec in record.left_out]
    plan = plan_or_skip(record, budget)
    assert part_removed(plan) >= budget["blocks"]
    assert plan.removed_of_blocks == part_removed(plan)
    spec = plan.specs[0]
    a_unit = spec.head_parameters * max(spec.heads_per_kv, spec.kv_heads) + spec.kv_parameters * spec.kv_heads
    a_step = max(a_unit, spec.neuron_parameters * budget["multiple_of"])
    whole = sum(block_parameters(spec) for spec in plan.specs)
    most = max(budget["blocks"] * whole, of_left_out(plan)) + a_step
    assert not budget["blocks"] or part_removed(plan) * whole < most, "and no unit more"


@given(record=records, budget=blocks_budgets, parts=st.tuples(ratios, ratios))
def test_a_larger_part_takes_the_same_units_and_more(
    record: EstimationRecord, budget: dict[str, Any], parts: tuple[float, float]
) -> None:
    low, high = (plan_or_skip(record, {**budget, "blocks": part}) for part in sorted(parts))
    for less, more in zip(low.blocks, high.blocks, strict=True):
        assert set(more.heads) <= set(less.heads) and set(more.neurons) <= set(less.neurons)


def test_a_part_of_the_blocks_that_floors_forbid_says_what_can_be_reached() -> None:
    record = make_record()
    record.blocks = [replace(spec, fixed_parameters=400) for spec in record.blocks]
    with pytest.raises(LightPeftError, match=r"blocks 0\.95 cannot be reached: .* at most 0\.\d+ .*lower"):
        plan_of(record, min_neurons=4, blocks=0.95)


@given(records, st.floats(0.5, 0.95), st.sampled_from([1, 4]), st.sampled_from(["group", "balanced"]))
def test_what_cannot_be_reached_is_known_before_estimation(
    record: EstimationRecord, part: float, multiple: int, unit: str
) -> None:
    """By the same line: the scores decide nothing of it."""
    light = light_of(blocks=part, multiple_of=multiple, head_unit=unit)
    try:
        check_reachable(record.blocks, record.left_out, light)
        known = None
    except LightPeftError as error:
        known = str(error)
    assert known == (refusal(lambda: make_plan(record, light)) if known else None)
    if known is None:
        assert part_removed(make_plan(record, light)) >= part


def test_a_depth_that_was_not_estimated() -> None:
    assert make_plan(make_record(layers=2, left_out=1), light_of(depth=1 / 3)).left_out
    with pytest.raises(
        LightPeftError, match=r"depth 0\.333\d+ drops blocks that were present during estimation; estimate again"
    ):
        make_plan(make_record(layers=3), light_of(depth=1 / 3))


@given(record=records, part=st.sampled_from([0.0, 0.25, 0.5, 0.7]), unit=st.sampled_from(["group", "balanced"]))
def test_blocks_layerwise_takes_the_same_share_of_every_layer(record: EstimationRecord, part: float, unit: str) -> None:
    record.left_out = []
    options: dict[str, Any] = {"head_unit": unit, "modules": 0, "ranks": 0, "scope": "layerwise"}
    plan = make_plan(record, light_of(blocks=part, **options))
    assert plan.blocks == make_plan(record, light_of(heads=part, neurons=part, experts=part, **options)).blocks
    assert len({len(kept.neurons) for kept in plan.blocks}) == 1


def test_blocks_layerwise_counts_a_depth_that_is_gone() -> None:
    record = make_record(layers=2, left_out=2, neurons=20)
    plan = make_plan(record, light_of(blocks=0.6, depth=0.5, scope="layerwise", modules=0, ranks=0))
    assert [len(kept.neurons) for kept in plan.blocks] == [16, 16], "a tenth more of all is a fifth of what is left"
