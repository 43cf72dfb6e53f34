"""Metrics of a model's answers by name, with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from datasets import Dataset
from torch import nn

from lightpeft.app.evaluation.respondent import BatchedModel
from lightpeft.app.evaluation.statistics import Interval, bootstrap_intervals
from lightpeft.app.tasks.answers import SCORE_MEANS, Outcome
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.tokens import Collator

T = TypeVar("T")


def evaluate(
    model: nn.Module,
    encoded: Dataset,
    task: Task,
    collator: Collator,
    batch_size: int | None,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """Return the metrics of a model on encoded test rows.

    Args:
        encoded: the result of `task.encode_test`.
        collator: the result of `task.collator`.
        batch_size: rows per forward pass; None: the default of the device.
        autocast: half precision to compute in; None: the dtype of the weights.

    Returns:
        The task's metrics, the main one first, then loss and examples. The loss is a mean in nats: per row for
        classification and multiple choice, per window for spans (start and end token), per token of the right option
        for likelihood, per labeled token for causal-lm. For regression it is the squared error; generated texts have
        none. Likelihood adds the accuracy of each rule that can choose an option.

    Raises:
        LightPeftError: there is no row or no token to predict, or the outputs are NaN or infinite.
    """
    return values_of(task.answer(BatchedModel(model, collator, batch_size, autocast), encoded), task)


def values_of(outcome: Outcome, task: Task) -> dict[str, float]:
    """Return the task's metrics of an outcome, then loss and examples, as `evaluate` does."""
    beside = SCORE_MEANS(outcome.answers)
    return {**task.score(outcome.answers), **beside, **outcome.measured, "examples": float(len(outcome.answers))}


@dataclass(frozen=True)
class Scores:
    """Metrics of a model by name, with intervals; names of a further split begin with its prefix."""

    metrics: dict[str, float]
    intervals: dict[str, Interval | None]
    """95% confidence intervals of the metrics that are functions of the answers."""


def scores_of(outcomes: Mapping[str, Outcome], task: Task, seed: int = 0) -> Scores:
    """Return metrics with bootstrap intervals.

    Args:
        outcomes: outcome by prefix; "" for the test rows.
        task: the task, with its metrics.
        seed: seed of the bootstrap.
    """
    metrics: dict[str, float] = {}
    intervals: dict[str, Interval | None] = {}
    for prefix, of_split in outcomes.items():
        metrics |= add_prefix(prefix, values_of(of_split, task))
        intervals |= add_prefix(prefix, bootstrap_intervals(of_split.answers, *task.measures, SCORE_MEANS, seed=seed))
    return Scores(metrics, intervals)


def add_prefix(prefix: str, values: Mapping[str, T]) -> dict[str, T]:
    """Return the values with `<prefix>_` before their names; an empty prefix (test rows) changes nothing."""
    return {f"{prefix}_{name}" if prefix else name: value for name, value in values.items()}
