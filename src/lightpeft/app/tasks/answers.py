"""What a model answered on every example, beside what is right: all that a metric needs, and what is written of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from lightpeft.errors import require

SHOWN_ROWS = 5
"""Rows that an error line names at most."""


@dataclass(frozen=True)
class Answers:
    """Predictions and references of the same examples, in the same order.

    What one entry is depends on the task: a class number, a number (regression), the index of an option, a text, or a
    tuple of sums (language modelling). Metrics are functions of it, so that one model run serves the metric, its
    confidence interval and every comparison.
    """

    predictions: Sequence[Any]
    """One an example."""
    references: Sequence[Any]
    """One an example; a list where several are right (texts of a question)."""
    groups: Sequence[Any] | None = None
    """Examples with the same value count together (the answers of one question); None: each for itself."""
    probabilities: np.ndarray | None = None
    """Float32 [examples, classes], where there are classes that are the same for every example."""
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Numbers that the model gives beside its answers, such as the loss, by name: float64 [examples]."""

    def __len__(self) -> int:
        return len(self.predictions)

    def take(self, indices: Sequence[int]) -> Answers:
        """The answers of some examples, in that order; an index may come twice."""
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
    """Answers to encoded rows, in their groups where they have some; arguments as for `Answers`."""
    groups = encoded["group"][:] if "group" in encoded.column_names else None
    return Answers(predictions, references, groups, probabilities)


@dataclass(frozen=True)
class Outcome:
    """What a model did on encoded test rows."""

    answers: Answers
    measured: dict[str, float] = field(default_factory=dict)
    """What is no mean of numbers of the examples, such as the loss a token, by name."""


Columns = dict[str, Sequence[Any]]
"""What is written of answers to new rows: columns of one value a row."""
DIGITS = 6
"""Decimals of what is written."""


def rounded(values: Iterable[float]) -> list[float]:
    """Numbers as they are written."""
    return [round(float(value), DIGITS) for value in values]


def _take(values: Any, indices: Sequence[int]) -> Any:
    """Some of the values; of an array an array, which takes a fraction of the time."""
    if isinstance(values, np.ndarray):
        return values[np.asarray(indices)]
    return [values[index] for index in indices]


def require_finite(finite: Sequence[bool] | np.ndarray) -> None:
    """Refuse answers that are no numbers: a label picked of them would look like any other.

    Args:
        finite: whether all that a row's answer was picked from was finite, one a row.

    Raises:
        LightPeftError: it was NaN or infinite somewhere; the rows are named, the first being number 1.
    """
    bad = [str(number) for number, good in enumerate(finite, 1) if not good]
    named = ", ".join(bad[:SHOWN_ROWS]) + (", ..." if bad[SHOWN_ROWS:] else "")
    require(
        not bad,
        f"the model's answers to {len(bad)} of {len(finite)} rows are NaN or infinite (row {named}); compute in "
        "float32 (model.dtype and training.precision), or train it again with a lower learning rate",
    )


Metric = Callable[[Answers], dict[str, float]]
"""Named values of answers; each is a mean-like number of them, so that it can be computed of resampled answers too."""


@dataclass(frozen=True)
class MeanMetric:
    """A `Metric` that is the mean of one number an example, as an accuracy is.

    A metric should be one where it can: resampling it is much faster, and where the numbers are 0 and 1 two
    models can be compared by an exact test.
    """

    scores: Callable[[Answers], dict[str, np.ndarray]]
    """Name of the metric -> float [examples]."""

    def __call__(self, answers: Answers) -> dict[str, float]:
        return {name: float(np.mean(values)) for name, values in self.scores(answers).items()}


BESIDES = MeanMetric(lambda answers: dict(answers.scores))
"""Means of the numbers that a model gives beside its answers."""


@dataclass(frozen=True)
class ClassMetric:
    """A `Metric` of class numbers that depends on nothing but how often each class is answered where each is right.

    Resampling it is fast.
    """

    of_counts: Callable[[np.ndarray], dict[str, float]]
    """What it is, of a confusion matrix: counts [right class, answered class]."""

    def __call__(self, answers: Answers) -> dict[str, float]:
        classes = class_count(answers)
        cells = np.asarray(answers.references) * classes + np.asarray(answers.predictions)
        return self.of_counts(np.bincount(cells, minlength=classes**2).reshape(classes, classes))


def class_count(answers: Answers) -> int:
    """How many classes there are: as many as probabilities, or as the highest number needs; at least 2."""
    if answers.probabilities is not None:
        return answers.probabilities.shape[-1]
    return max(2, 1 + max(max(answers.predictions), max(answers.references)))
