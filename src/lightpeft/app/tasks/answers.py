"""Predictions of a model and their references, one pair per example: the input of every metric and prediction file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from lightpeft.errors import require

SHOWN_ROWS = 5
"""Most rows that an error message names."""


@dataclass(frozen=True)
class Answers:
    """Predictions and references of the same examples, in the same order.

    The task decides the type of an entry: a class number, a number (regression), the index of an option, a text, or a
    tuple of sums (language modeling). Metrics are functions of it, so that one model run serves the metric, its
    confidence interval and every comparison.
    """

    predictions: Sequence[Any]
    """One per example."""
    references: Sequence[Any]
    """One per example; a list if several are right (texts of a question)."""
    groups: Sequence[Any] | None = None
    """One key per example; equal keys form one group (the answers to one question). None: every example is its own."""
    probabilities: np.ndarray | None = None
    """Float32 [examples, classes], if all examples have the same classes; else None."""
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Further numbers per example, such as the loss, by name: float64 [examples]."""

    def __len__(self) -> int:
        return len(self.predictions)

    def take(self, indices: Sequence[int]) -> Answers:
        """Return the answers at `indices`, in that order; an index may occur twice."""
        return Answers(
            _take(self.predictions, indices),
            _take(self.references, indices),
            None if self.groups is None else _take(self.groups, indices),
            None if self.probabilities is None else self.probabilities[np.asarray(indices)],
            {name: values[np.asarray(indices)] for name, values in self.scores.items()},
        )


def answers_of(
    encoded: Dataset, predictions: Sequence[Any], references: Sequence[Any], probabilities: np.ndarray | None = None
) -> Answers:
    """Return `Answers` to encoded rows, with the groups of column `group` if the rows have one."""
    groups = encoded["group"][:] if "group" in encoded.column_names else None
    return Answers(predictions, references, groups, probabilities)


@dataclass(frozen=True)
class Outcome:
    """Answers of a model to encoded test rows, with metrics that are not functions of single answers."""

    answers: Answers
    measured: dict[str, float] = field(default_factory=dict)
    """Metrics that are not a mean over examples, such as the loss per token, by name."""


Columns = dict[str, Sequence[Any]]
"""Columns of a prediction file: name -> one value per row."""
DIGITS = 6
"""Decimals of numbers in prediction files."""


def round_all(values: Iterable[float]) -> list[float]:
    """Return numbers rounded to `DIGITS` decimals, as prediction files hold them."""
    return [round(float(value), DIGITS) for value in values]


def _take(values: Any, indices: Sequence[int]) -> Any:
    """Return the values at `indices`; an array is indexed as an array, which is much faster."""
    if isinstance(values, np.ndarray):
        return values[np.asarray(indices)]
    return [values[index] for index in indices]


def require_finite(finite: Sequence[bool] | np.ndarray) -> None:
    """Raise `LightPeftError` if the outputs for a row are NaN or infinite: their argmax would look like a valid label.

    Args:
        finite: one boolean per row: True if all outputs for it are finite.

    Raises:
        LightPeftError: an entry is False; the message gives the row numbers, from 1.
    """
    bad = [str(number) for number, good in enumerate(finite, 1) if not good]
    named = ", ".join(bad[:SHOWN_ROWS]) + (", ..." if bad[SHOWN_ROWS:] else "")
    require(
        not bad,
        f"the model's answers to {len(bad)} of {len(finite)} rows are NaN or infinite (row {named}); compute in "
        "float32 (model.dtype and training.precision), or train again with a lower learning rate",
    )


Metric = Callable[[Answers], dict[str, float]]
"""Function of answers that returns named values; the bootstrap calls it on resampled answers, too."""


@dataclass(frozen=True)
class MeanMetric:
    """A `Metric` that is the mean of one number per example, such as the accuracy.

    The bootstrap of a mean is much faster than that of an arbitrary metric, and if all numbers are 0 or 1, McNemar's
    exact test compares two models.
    """

    scores: Callable[[Answers], dict[str, np.ndarray]]
    """Name of the metric -> float [examples]."""

    def __call__(self, answers: Answers) -> dict[str, float]:
        return {name: float(np.mean(values)) for name, values in self.scores(answers).items()}


SCORE_MEANS = MeanMetric(lambda answers: dict(answers.scores))
"""Means of `Answers.scores`, such as the mean loss."""


@dataclass(frozen=True)
class ClassMetric:
    """A `Metric` that is a function of the confusion matrix, such as F1. Its bootstrap is fast."""

    of_counts: Callable[[np.ndarray], dict[str, float]]
    """Function of the confusion matrix, int [true class, predicted class]; returns the metric by name."""

    def __call__(self, answers: Answers) -> dict[str, float]:
        classes = class_count(answers)
        cells = np.asarray(answers.references) * classes + np.asarray(answers.predictions)
        return self.of_counts(np.bincount(cells, minlength=classes**2).reshape(classes, classes))


def class_count(answers: Answers) -> int:
    """Return the number of classes: the width of `probabilities`, else the highest class number + 1; at least 2."""
    if answers.probabilities is not None:
        return answers.probabilities.shape[-1]
    return max(2, 1 + max(max(answers.predictions), max(answers.references)))
