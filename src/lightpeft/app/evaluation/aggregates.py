"""How sure a difference of two methods is over tasks and seeds: aggregates, and their stratified bootstrap intervals.

Pure functions of numbers, in the way of Agarwal et al. (2021, "Deep Reinforcement Learning at the Edge of the
Statistical Precipice"). A stratum is one task: its paired differences, one a seed, along the last dimension of an
array. So one function computes a value of the observed differences [seeds] and of all resamples [resamples, seeds].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import trim_mean

from lightpeft.app.evaluation.statistics import LEVEL, Interval, percentile_interval

RESAMPLES = 10_000
"""Resamples of a stratified bootstrap: of so few numbers they take milliseconds."""
TRIMMED = 0.25
"""Part that an interquartile mean leaves out at either end."""

Strata = Sequence[np.ndarray]
"""Differences of each task, float [..., seeds]; tasks may have other numbers of seeds."""
Statistic = Callable[[Strata], np.ndarray]
"""What is computed of strata, float [...]."""


@dataclass(frozen=True)
class Estimate:
    """A statistic of the observed differences."""

    value: float
    interval: Interval | None
    """Percentile interval over seeds; None where the seeds that are there say nothing about others: of a task there is
    one, or all resamples give the same value (seeds that all agree do not mean that every seed would)."""


def mean_difference(strata: Strata) -> np.ndarray:
    """Mean over tasks of each task's mean, so that all tasks count the same."""
    return np.mean([task.mean(-1) for task in strata], axis=0)


def interquartile_mean(strata: Strata) -> np.ndarray:
    """Mean of the middle half of all tasks' differences together: 25% go at either end, rounded down.

    It is that of rliable and `scipy.stats.trim_mean`: of fewer than four differences nothing goes.
    """
    return np.asarray(trim_mean(np.concatenate(strata, axis=-1), TRIMMED, axis=-1))


def probability_of_improvement(strata: Strata) -> np.ndarray:
    """Mean over tasks of the part of the differences that are above zero; those that are zero count half."""
    return mean_difference([(1 + np.sign(task)) / 2 for task in strata])


def estimate(
    statistic: Statistic, strata: Strata, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Estimate:
    """A statistic with its interval by the stratified bootstrap: seeds are drawn with replacement within each task.

    Tasks are not drawn: the interval is about other seeds of these tasks, and says nothing about other tasks. Of few
    seeds a percentile interval is too narrow (docs/reproduce.md says by how much).

    Args:
        strata: differences of each task, float [seeds].
        seed: of the draws; every statistic sees the same ones.
    """
    value = float(statistic(strata))
    if min(len(task) for task in strata) < 2:
        return Estimate(value, None)
    generator = np.random.default_rng(seed)
    drawn = [task[generator.integers(0, len(task), (resamples, len(task)))] for task in strata]
    values = statistic(drawn)
    return Estimate(value, percentile_interval(values, level) if np.ptp(values) > 0 else None)
