"""Aggregates over tasks and seeds: their definitions, what must hold of any differences, and what intervals promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes import thorough
from scipy.stats import bootstrap

from lightpeft.app.evaluation.aggregates import (
    Statistic,
    estimate,
    interquartile_mean,
    mean_difference,
    probability_of_improvement,
)

STATISTICS: list[Statistic] = [mean_difference, interquartile_mean, probability_of_improvement]
LOCATIONS: list[Statistic] = [mean_difference, interquartile_mean]
every_statistic = pytest.mark.parametrize("statistic", STATISTICS)
every_location = pytest.mark.parametrize("statistic", LOCATIONS)

# whole numbers, so that sums are exact and ties are common
values = st.integers(-40, 40).map(float)


def grids(least_seeds: int = 1) -> st.SearchStrategy[list[np.ndarray]]:
    """Differences of a few tasks, each of a number of seeds of its own."""
    task = st.lists(values, min_size=least_seeds, max_size=5).map(np.array)
    return st.lists(task, min_size=1, max_size=4)


# -- definitions -------------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    strata = [np.array([1.0, -2.0, 0.0]), np.array([3.0]), np.array([10.0, 100.0, -100.0, 4.0])]
    assert mean_difference(strata) == pytest.approx((-1 / 3 + 3 + 3.5) / 3)
    # of eight, two go at either end: -2 and -100, 10 and 100
    assert interquartile_mean(strata) == pytest.approx((1 + 0 + 3 + 4) / 4)
    # 1 of 3 and a tie; 1 of 1; 3 of 4
    assert probability_of_improvement(strata) == pytest.approx((0.5 + 1 + 0.75) / 3)


# -- what must hold ----------------------------------------------------------------------------------------------------


@every_statistic
@given(strata=grids(), data=st.data())
def test_the_order_of_seeds_and_tasks_says_nothing(
    statistic: Statistic, strata: list[np.ndarray], data: st.DataObject
) -> None:
    mixed = data.draw(st.permutations([np.array(data.draw(st.permutations(list(task)))) for task in strata]))
    assert statistic(mixed) == pytest.approx(float(statistic(strata)))


@every_location
@given(strata=grids(), by=values, times=st.integers(1, 9))
def test_a_location_moves_and_stretches_with_its_values(
    statistic: Statistic, strata: list[np.ndarray], by: float, times: int
) -> None:
    expected = times * float(statistic(strata)) + by
    assert statistic([times * task + by for task in strata]) == pytest.approx(expected, abs=1e-9)
    everything = np.concatenate(strata)
    assert everything.min() - 1e-9 <= statistic(strata) <= everything.max() + 1e-9


@every_statistic
@given(strata=grids())
def test_the_other_way_round(statistic: Statistic, strata: list[np.ndarray]) -> None:
    """The baseline against the method: a difference changes its sign, a probability is that of the opposite."""
    turned, straight = statistic([-task for task in strata]), statistic(strata)
    expected = 1 - straight if statistic is probability_of_improvement else -straight
    assert turned == pytest.approx(float(expected), abs=1e-9)


# -- intervals ---------------------------------------------------------------------------------------------------------


@every_statistic
@given(strata=grids(least_seeds=2))
@settings(max_examples=40)
def test_an_interval_lies_among_what_seeds_can_give(statistic: Statistic, strata: list[np.ndarray]) -> None:
    found = estimate(statistic, strata, resamples=200)
    assert found == estimate(statistic, strata, resamples=200), "the draws are always the same"
    if found.interval is not None:
        low, high = found.interval
        ends = [float(statistic([np.array([pick(task)]) for task in strata])) for pick in (np.min, np.max)]
        if statistic is not interquartile_mean:  # which weighs tasks by their seeds
            assert ends[0] - 1e-9 <= low <= high <= ends[1] + 1e-9
        wide = estimate(statistic, strata, resamples=200, level=0.99).interval
        assert wide is not None and wide[0] <= low <= high <= wide[1]


@every_statistic
@given(strata=grids(least_seeds=2), one=values)
@settings(max_examples=20)
def test_one_seed_of_a_task_has_no_interval(statistic: Statistic, strata: list[np.ndarray], one: float) -> None:
    found = estimate(statistic, [*strata, np.array([one])], resamples=50)
    assert found.interval is None
    assert found.value == statistic([*strata, np.array([one])])


@every_statistic
@given(tasks=st.lists(st.tuples(values, st.integers(2, 5)), min_size=1, max_size=4))
@settings(max_examples=20)
def test_tasks_are_not_resampled(statistic: Statistic, tasks: list[tuple[float, int]]) -> None:
    """However far apart tasks are, seeds that agree within each give one value, and that is no certainty."""
    found = estimate(statistic, [np.full(seeds, value) for value, seeds in tasks], resamples=50)
    assert found.interval is None


@every_location
def test_equals_scipy_of_several_samples(statistic: Statistic) -> None:
    """scipy draws other numbers, so ends are compared within a hundredth of what the values spread."""
    draw = np.random.default_rng(1)
    strata = [draw.normal(at, 1, 8) for at in (0, 5, -3)]
    theirs = bootstrap(
        strata, lambda *tasks, axis: statistic(tasks), n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    ours = estimate(statistic, strata, resamples=20_000).interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.02)


@thorough
@pytest.mark.parametrize(("seeds", "least", "most"), [(2, 0.63, 0.79), (3, 0.76, 0.90), (10, 0.87, 0.97)])
def test_coverage(seeds: int, least: float, most: float) -> None:
    """Of three tasks: with ten seeds near to the 95% that it is called, with two or three less, as the docs say."""
    draw = np.random.default_rng(seeds)
    held = 0
    for _ in range(400):
        interval = estimate(mean_difference, [draw.normal(0, 1, seeds) for _ in range(3)], resamples=400).interval
        assert interval is not None
        held += interval[0] <= 0 <= interval[1]
    assert least <= held / 400 <= most  # four standard errors of a binomial around what 1,500 grids gave
