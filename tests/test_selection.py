"""One selection of units, as properties over random layers: exact counts, floors, ties, costs, and other orders."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import half_up, ratios, scopes
from torch import Tensor

from lightpeft.config.light import Scope
from lightpeft.errors import LightPeftError
from lightpeft.plans.selection import Layer, keep, keep_part, remaining_units, removal_order, weakest_first


def of_scores(layers: Sequence[Sequence[float]], floor: int = 0) -> list[Layer]:
    """Layers of units that all cost the same."""
    return [Layer("neurons", index, torch.tensor(scores), floor) for index, scores in enumerate(layers)]


# Parts of layers


selections = st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=1, max_size=9), min_size=1)


@given(layers=selections, ratio=ratios)
def test_layerwise_keeps_the_top_of_each_layer(layers: list[list[float]], ratio: float) -> None:
    kept = keep_part(of_scores(layers, 0), ratio, "layerwise")
    for layer, units in zip(layers, kept, strict=True):
        best_first = sorted(range(len(layer)), key=lambda unit: (-layer[unit], unit))
        assert units == sorted(best_first[: len(layer) - half_up(ratio * len(layer))])


@given(layers=selections, ratio=ratios)
def test_global_keeps_the_top_of_all(layers: list[list[float]], ratio: float) -> None:
    kept = keep_part(of_scores(layers, 0), ratio, "global")
    everything = [(-score, i, j) for i, layer in enumerate(layers) for j, score in enumerate(layer)]
    best_first = sorted(everything)
    expected = best_first[: len(everything) - half_up(ratio * len(everything))]
    assert {(i, j) for i, units in enumerate(kept) for j in units} == {(i, j) for _, i, j in expected}


@given(layers=selections, ratio=ratios, floor=st.integers(0, 4), scope=scopes)
def test_floors_win_and_counts_are_exact_where_they_allow(
    layers: list[list[float]], ratio: float, floor: int, scope: Scope
) -> None:
    kept = keep_part(of_scores(layers, floor), ratio, scope)
    floors = [min(floor, len(layer)) for layer in layers]
    for layer, units, least in zip(layers, kept, floors, strict=True):
        assert len(units) >= least
        best_first = sorted(range(len(layer)), key=lambda unit: (-layer[unit], unit))
        assert units == sorted(best_first[: len(units)]), "within a layer the best stay"
    sizes = [len(layer) for layer in layers]
    if scope == "global":
        expected = sum(sizes) - half_up(ratio * sum(sizes))
        assert sum(map(len, kept)) == max(expected, sum(floors))
    else:
        counts = [max(size - half_up(ratio * size), least) for size, least in zip(sizes, floors, strict=True)]
        assert list(map(len, kept)) == counts


@given(layers=selections, low=ratios, high=ratios, floor=st.integers(0, 2), scope=scopes)
def test_a_larger_ratio_keeps_a_subset(
    layers: list[list[float]], low: float, high: float, floor: int, scope: Scope
) -> None:
    more, less = (keep_part(of_scores(layers, floor), ratio, scope) for ratio in (min(low, high), max(low, high)))
    assert all(set(few) <= set(many) for few, many in zip(less, more, strict=True))


def test_ties_go_by_index() -> None:
    equal = [[0.0] * 4, [0.0] * 4]
    assert keep_part(of_scores(equal), 0.5, "layerwise") == [[0, 1], [0, 1]]
    assert keep_part(of_scores(equal), 0.5, "global") == [[0, 1, 2, 3], []]
    assert keep_part(of_scores(equal, floor=1), 0.5, "global") == [[0, 1, 2], [0]]


# By cost

costly = st.builds(
    lambda scores, cost, floor: Layer("heads", 0, torch.tensor(scores, dtype=torch.float64), floor, cost),
    scores=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0]), min_size=1, max_size=8),
    cost=st.sampled_from([1, 3, 10]),
    floor=st.integers(0, 2),
)


@given(layers=st.lists(costly, min_size=1, max_size=5))
def test_units_go_by_score_per_parameter(layers: list[Layer]) -> None:
    order = removal_order(layers)
    units = [(float(score) / layer.cost, layer) for layer in layers for score in layer.scores]
    costs = [units[index][0] for index in order.tolist()]
    assert costs == sorted(costs) and len(set(order.tolist())) == len(order)
    for layer, kept in zip(layers, remaining_units(layers, order), strict=True):
        assert len(kept) == min(layer.floor, len(layer.scores)), "all but the floors may go"
        gone = set(range(len(layer.scores))) - set(kept)
        assert all(layer.scores[unit] <= layer.scores[stays] for unit in gone for stays in kept)


@given(layers=st.lists(costly, min_size=1, max_size=5), count=st.integers(0, 40))
def test_what_goes_first_is_gone(layers: list[Layer], count: int) -> None:
    order = removal_order(layers)
    kept = keep(layers, count)
    assert kept == remaining_units(layers, order[:count])
    flat = [unit for layer in layers for unit in range(len(layer.scores))]
    assert sum(map(len, kept)) == len(flat) - min(count, len(order))
    more = remaining_units(layers, order[: count + 1])
    assert all(set(after) <= set(before) for before, after in zip(kept, more, strict=True))


# Another order


@given(layers=selections, ratio=ratios, floor=st.integers(0, 3), scope=scopes, seed=st.integers(0, 9))
def test_counts_and_floors_hold_in_any_order(
    layers: list[list[float]], ratio: float, floor: int, scope: Scope, seed: int
) -> None:
    def shuffled(competing: Sequence[Layer]) -> Tensor:
        units = sum(len(layer.scores) for layer in competing)
        return torch.randperm(units, generator=torch.Generator().manual_seed(seed))

    usual, other = (keep_part(of_scores(layers, floor), ratio, scope, order) for order in (weakest_first, shuffled))
    assert sum(map(len, other)) == sum(map(len, usual))
    assert all(len(kept) >= min(floor, len(layer)) for kept, layer in zip(other, layers, strict=True))
    if scope == "layerwise":
        assert list(map(len, other)) == list(map(len, usual))


def test_units_go_in_the_order_that_is_given() -> None:
    layers = of_scores([[5.0, 6.0, 7.0], [1.0, 2.0]], floor=1)
    assert removal_order(layers, lambda _: torch.tensor([2, 4, 0, 3, 1])).tolist() == [2, 4, 0]
    assert keep(layers, 2, lambda _: torch.tensor([2, 4, 0, 3, 1])) == [[0, 1], [0]]


def test_units_that_are_not_in_the_order_stay() -> None:
    assert keep(of_scores([[0.0, 1.0], [2.0, 3.0]]), 4, lambda _: torch.tensor([3])) == [[0, 1], [0]]


@pytest.mark.parametrize("units", [[0, 0, 1], [0, 1, 2, 3], [-1, 0, 1]])
def test_what_is_no_order_is_refused(units: list[int]) -> None:
    with pytest.raises(LightPeftError, match="return indices below 3, each at most once"):
        keep(of_scores([[0.0, 1.0], [2.0]]), 1, lambda _: torch.tensor(units))
