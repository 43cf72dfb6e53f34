"""The base of kinds whose answer is one of several options: labels of the task, or a row's own options."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from lightpeft.app.tasks.answers import Answers, Columns, answers_of
from lightpeft.app.tasks.kinds.base import Task


class OptionsTask(Task):
    """Base of tasks whose answer is one of several options."""

    @abstractmethod
    def right_options(self, rows: Dataset) -> list[int]:
        """Return the index of the right option of every row.

        Raises:
            LightPeftError: the right answer of a row is not among the options.
        """

    @abstractmethod
    def options(self, row: Mapping[str, Any]) -> Sequence[str]:
        """Return the texts of the options of a row, in order, for a language model to score."""

    @abstractmethod
    def prompt(self, row: Mapping[str, Any]) -> str:
        """Return the prompt template over the columns of a row, for a language model."""

    @abstractmethod
    def picked(self, probabilities: Sequence[np.ndarray], rows: Dataset) -> Columns:
        """Return the columns of a prediction file from probabilities, one array float [options] per row."""


def chosen_answers(encoded: Dataset, chosen: list[int]) -> Answers:
    """Return `Answers` for the chosen options: their indices or, if several may be right, their names."""
    if "right" not in encoded.column_names:
        return answers_of(encoded, chosen, encoded["labels"][:])
    texts = [names[index] for names, index in zip(encoded["names"], chosen, strict=True)]
    return answers_of(encoded, texts, encoded["right"][:])


def split_by_counts(values: list[Any], counts: list[int]) -> list[list[Any]]:
    """Split a flat list into lists with `counts` items."""
    items = iter(values)
    return [[next(items) for _ in range(count)] for count in counts]
