"""What is measured of a model's answers: metrics by name, and how sure one can be of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from datasets import Dataset
from torch import nn

from lightpeft.app.evaluation.respondent import BatchedModel
from lightpeft.app.evaluation.statistics import Interval, bootstrap_intervals
from lightpeft.app.tasks.answers import BESIDES, Outcome
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
    """Metrics of `model` on what `task.encode_test` gave; the other arguments as for `BatchedModel`.

    Returns:
        What `task` measures, the main metric first, then the loss and examples. The loss is a mean in nats: of
        classification and multiple choice the cross-entropy a row, of spans that of a window's first and last token, by
        likelihood that of a token of the right option, of causal-lm that of a labelled token; of regression it is the
        squared error, and of generated texts there is none. Likelihood adds the accuracy of each rule that can pick an
        option.

    Raises:
        LightPeftError: as `Task.answer`.
    """
    return values_of(task.answer(BatchedModel(model, collator, batch_size, autocast), encoded), task)


def values_of(outcome: Outcome, task: Task) -> dict[str, float]:
    """What `evaluate` returns, of an outcome at hand."""
    beside = BESIDES(outcome.answers)
    return {**task.score(outcome.answers), **beside, **outcome.measured, "examples": float(len(outcome.answers))}


@dataclass(frozen=True)
class Scores:
    """What is measured of a model, by name; of a further split the names begin with its prefix."""

    metrics: dict[str, float]
    intervals: dict[str, Interval | None]
    """95% confidence intervals of those that are functions of the answers."""


def scores_of(outcomes: Mapping[str, Outcome], task: Task, seed: int = 0) -> Scores:
    """Metrics with bootstrap intervals.

    Args:
        outcomes: by prefix; "" for the test rows.
        task: says what is measured.
        seed: of the bootstrap.
    """
    metrics: dict[str, float] = {}
    intervals: dict[str, Interval | None] = {}
    for prefix, of_split in outcomes.items():
        metrics |= prefixed(prefix, values_of(of_split, task))
        intervals |= prefixed(prefix, bootstrap_intervals(of_split.answers, *task.measures, BESIDES, seed=seed))
    return Scores(metrics, intervals)


def prefixed(prefix: str, values: Mapping[str, T]) -> dict[str, T]:
    """Values by name, with the prefix of their split; that of the test rows is empty."""
    return {f"{prefix}_{name}" if prefix else name: value for name, value in values.items()}
