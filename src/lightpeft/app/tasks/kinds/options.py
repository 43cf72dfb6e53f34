"""What kinds share whose answer is one of several options, labels of the task or a row's own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from lightpeft.app.tasks.answers import Answers, Columns, answers_of
from lightpeft.app.tasks.kinds.base import Task


class OptionsTask(Task):
    """One of several options is right."""

    @abstractmethod
    def right_options(self, rows: Dataset) -> list[int]:
        """The number of every row's right option.

        Raises:
            LightPeftError: a row has none that the task knows.
        """

    @abstractmethod
    def options(self, row: Mapping[str, Any]) -> Sequence[str]:
        """The texts that a language model may answer a row with, in order."""

    @abstractmethod
    def prompt(self, row: Mapping[str, Any]) -> str:
        """The template over a row's columns that a language model reads before the answer."""

    @abstractmethod
    def picked(self, probabilities: Sequence[np.ndarray], rows: Dataset) -> Columns:
        """What is written of every row's probabilities, float [options]."""


def chosen_answers(encoded: Dataset, chosen: list[int]) -> Answers:
    """Answers by option: its number or, where several may be right, its name."""
    if "right" not in encoded.column_names:
        return answers_of(encoded, chosen, encoded["labels"][:])
    texts = [names[index] for names, index in zip(encoded["names"], chosen, strict=True)]
    return answers_of(encoded, texts, encoded["right"][:])


def nested(values: list[Any], counts: list[int]) -> list[list[Any]]:
    """A flat list cut into rows of so many items."""
    items = iter(values)
    return [[next(items) for _ in range(count)] for count in counts]
