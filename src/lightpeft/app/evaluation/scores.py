"""Metrics of a model's answers by name, with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from lightpeft.app.evaluation.statistics import Interval, bootstrap_intervals
from lightpeft.app.tasks.answers import SCORE_MEANS, Outcome
from lightpeft.app.tasks.kinds.base import Task

LOWER_IS_BETTER = ("loss", "mse", "perplexity")
"""Metrics of which less is better; of all others more is."""

T = TypeVar("T")


def values_of(outcome: Outcome, task: Task) -> dict[str, float]:
    """Return the task's metrics of an outcome, the main one first, then loss and examples.

    The loss is a mean in nats: per row for classification and multiple choice, per window for spans (start and end
    token), per token of the right option for likelihood, per labeled token for causal-lm. For regression it is the
    squared error; generated texts have none. Likelihood adds the accuracy of each rule that can choose an option.
    """
    beside = SCORE_MEANS(outcome.answers)
    return {**task.score(outcome.answers), **beside, **outcome.measured, "examples": float(len(outcome.answers))}


@dataclass(frozen=True)
class Scores:
    """Metrics of a model by name, with intervals; names of a further split begin with its prefix."""

    metrics: dict[str, float]
    intervals: dict[str, Interval | None]
    """95% confidence intervals of the metrics that are functions of the answers."""


def scores_of(outcomes: Mapping[str, Outcome], task: Task) -> Scores:
    """Return metrics with bootstrap intervals.

    Args:
        outcomes: outcome by prefix; "" for the test rows.
        task: the task, with its metrics.
    """
    metrics: dict[str, float] = {}
    intervals: dict[str, Interval | None] = {}
    for prefix, of_split in outcomes.items():
        metrics |= add_prefix(prefix, values_of(of_split, task))
        intervals |= add_prefix(prefix, bootstrap_intervals(of_split.answers, *task.measures, SCORE_MEANS))
    return Scores(metrics, intervals)


def add_prefix(prefix: str, values: Mapping[str, T]) -> dict[str, T]:
    """Return the values with `<prefix>_` before their names; an empty prefix (test rows) changes nothing."""
    return {f"{prefix}_{name}" if prefix else name: value for name, value in values.items()}
