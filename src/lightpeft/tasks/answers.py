"""What a model answered on every example, beside what is right: all that a metric needs, and no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


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

    def __len__(self) -> int:
        return len(self.predictions)

    def take(self, indices: Sequence[int]) -> Answers:
        """The answers of some examples, in that order; an index may come twice."""
        return Answers(
            [self.predictions[index] for index in indices],
            [self.references[index] for index in indices],
            None if self.groups is None else [self.groups[index] for index in indices],
            None if self.probabilities is None else self.probabilities[list(indices)],
        )


Metric = Callable[[Answers], dict[str, float]]
"""Named values of answers; each is a mean-like number of them, so that it can be computed of resampled answers too."""
