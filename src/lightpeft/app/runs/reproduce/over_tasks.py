"""From the rows of a grid to one line for each model and method over all its tasks: numbers, no text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lightpeft.app.evaluation.aggregates import (
    Estimate,
    estimate,
    interquartile_mean,
    mean_difference,
    probability_of_improvement,
)
from lightpeft.app.runs.reproduce.grid import cell_name
from lightpeft.app.runs.reproduce.summary import MEASURES, Results, Row

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
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in results.rows:
        scale = scale_of(row.metric)
        if row.method != results.baseline and scale is not None:
            groups.setdefault((row.model, row.method, scale.unit), []).append(row)
    base = {(row.model, row.task): row for row in results.rows if row.method == results.baseline}
    summaries = (_summary(results, rows, base) for rows in groups.values())
    return [summary for summary in summaries if summary is not None]


def _summary(results: Results, rows: list[Row], base: Mapping[tuple[str, str], Row]) -> Summary | None:
    """The summary of one method's rows, which have one unit; None where fewer than two tasks have a pair."""
    paired = {row.task: pairs for row in rows if (pairs := _pairs(row, base.get((row.model, row.task))))}
    if len(paired) < 2:
        return None
    strata = [np.array([gain for _, gain in pairs]) for pairs in paired.values()]
    count = sum(len(task) for task in strata)
    cells = [(row, seed) for row in rows for seed, _ in paired.get(row.task, [])]
    scale = scale_of(rows[0].metric)
    assert scale is not None
    return Summary(
        rows[0].model,
        rows[0].method,
        scale.unit,
        list(paired),
        count,
        estimate(mean_difference, strata),
        estimate(interquartile_mean, strata) if count >= 4 else None,
        estimate(probability_of_improvement, strata),
        {name: _median(_ratios(results, cells, name)) for name in RATIOS},
    )


def _pairs(row: Row, base: Row | None) -> list[tuple[int, float]]:
    """Seeds that a row and the baseline's have both, and by how much the row is better with each."""
    scale = scale_of(row.metric)
    if base is None or scale is None:
        return []
    others = dict(zip(base.seeds, base.quality, strict=True))
    own = zip(row.seeds, row.quality, strict=True)
    return [(seed, scale.gain(value, others[seed])) for seed, value in own if seed in others]


def _ratios(results: Results, cells: Iterable[tuple[Row, int]], name: str) -> Iterator[float]:
    for row, seed in cells:
        names = (cell_name(row.model, row.task, method, seed) for method in (row.method, results.baseline))
        own, base = (MEASURES[name](results.reports[cell]) if cell in results.reports else None for cell in names)
        if own is not None and base:
            yield own / base


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None
