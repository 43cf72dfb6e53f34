"""From the rows of a grid to one line for each model and method over all its tasks: numbers, no text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pandas import DataFrame, isna

from lightpeft.app.evaluation.aggregates import (
    Estimate,
    estimate,
    interquartile_mean,
    mean_difference,
    probability_of_improvement,
)
from lightpeft.app.runs.reproduce.grid import cell_name
from lightpeft.app.runs.reproduce.results import MEASURES, Results, Row

RATIOS = ("seconds", "samples_per_second")
"""Of `MEASURES`, those whose ratio to the baseline's is told."""


# -- what can be averaged ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """A unit that differences of several metrics have in common."""

    unit: str
    gain: Callable[[float, float], float]
    """By how much a value of a metric is better than the baseline's, in the unit."""


POINTS = Scale("points", lambda own, base: 100 * (own - base))
"""Of metrics that are a part of one, as GLUE averages accuracies, F1 and correlations."""
_NATS = "nats"
_SCALES: Mapping[str, Scale | None] = {
    "loss": Scale(_NATS, lambda own, base: base - own),
    "perplexity": Scale(_NATS, lambda own, base: math.log(base) - math.log(own)),
    "mse": None,
}
"""Metrics that are no part of one. A perplexity is compared by its logarithm, which is a loss; a squared error has the
unit of its task's labels, which no other task need have."""


def scale_of(metric: str) -> Scale | None:
    """How differences of a metric are told; None: they cannot be averaged over tasks."""
    return _SCALES.get(metric, POINTS)


def without_scale(results: Results) -> list[str]:
    """The grid's metrics that cannot be averaged over tasks."""
    return sorted({row.metric for row in results.rows if scale_of(row.metric) is None})


# -- summaries ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """One model and method over the tasks whose metrics have one unit, against the baseline.

    It is of pairs: a task and a seed that both have finished.
    """

    model: str
    method: str
    unit: str
    tasks: list[str]
    """Those with a pair; two at least."""
    pairs: int
    mean: Estimate
    """Of the differences, each task counting the same; more is better whatever the metric."""
    iqm: Estimate | None
    """Their interquartile mean, over all pairs; None of fewer than four, which have no quarter to leave out."""
    improvement: Estimate
    """Part of the pairs in which the method is better, ties counting half; mean over tasks."""
    ratios: dict[str, float | None]
    """Of `RATIOS`: median over pairs of the method's value by the baseline's; None where no pair has both."""


def over_tasks(results: Results) -> list[Summary]:
    """A summary for each model and method that has pairs in two tasks or more, in the order of the rows.

    It is made of what a results file holds, old ones included (`read_results`).
    """
    summaries = []
    for (model, method, unit), pairs in _pairs(results).groupby(["model", "method", "unit"], sort=False):
        strata = [task.to_numpy() for _, task in pairs.groupby("task", sort=False)["gain"]]
        if len(strata) > 1:
            medians = {name: pairs[name].median() for name in RATIOS}
            summary = Summary(
                model,
                method,
                unit,
                list(pairs["task"].unique()),
                len(pairs),
                estimate(mean_difference, strata),
                estimate(interquartile_mean, strata) if len(pairs) >= 4 else None,
                estimate(probability_of_improvement, strata),
                {name: None if isna(value) else float(value) for name, value in medians.items()},
            )
            summaries.append(summary)
    return summaries


def _pairs(results: Results) -> DataFrame:
    """What both a method and the baseline have of a task and a seed: by how much the method is better, and ratios."""
    base = {
        (row.model, row.task, seed): value
        for row in results.rows
        if row.method == results.baseline
        for seed, value in zip(row.seeds, row.quality, strict=True)
    }
    pairs = []
    for row in results.rows:
        scale = scale_of(row.metric)
        if row.method == results.baseline or scale is None:
            continue
        for seed, value in zip(row.seeds, row.quality, strict=True):
            if (row.model, row.task, seed) in base:
                gain = scale.gain(value, base[row.model, row.task, seed])
                ratios = [_ratio(results, row, seed, name) for name in RATIOS]
                pairs.append((row.model, row.task, row.method, scale.unit, gain, *ratios))
    return DataFrame(pairs, columns=["model", "task", "method", "unit", "gain", *RATIOS])


def _ratio(results: Results, row: Row, seed: int, name: str) -> float:
    """A measure of one run by the baseline's; NaN where one of both has none."""
    names = (cell_name(row.model, row.task, method, seed) for method in (row.method, results.baseline))
    own, base = (MEASURES[name](results.reports[cell]) if cell in results.reports else None for cell in names)
    return own / base if own is not None and base else math.nan
