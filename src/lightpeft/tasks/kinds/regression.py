"""Regression: a number for a text or a pair of texts."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lightpeft.config import Head, TaskEntry
from lightpeft.console.bars import Progress, bar
from lightpeft.errors import require
from lightpeft.tasks.kinds.base import values
from lightpeft.tasks.kinds.texts import TextTask


class RegressionTask(TextTask):
    """One number a row, learned by mean squared error."""

    head: ClassVar[Head] = "regression"
    answering: ClassVar[str] = "regression"
    default_metrics: ClassVar[tuple[str, ...]] = ("pearson", "spearman", "mse")

    @classmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Texts are strings that are not blank; labels are finite numbers."""
        cls.check_inputs(rows, entry, what)
        for where, value in values(rows, "label", entry, what):
            require(_number(value) is not None, f"{where}: {value!r} is no number; regression needs one in every row")

    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress = bar
    ) -> Dataset:
        """Rows cut to `max_length` tokens, with `labels` as floats."""
        encoded = self.encode_inputs(rows, tokenizer, max_length, progress)
        return encoded.add_column("labels", [_number(value) for value in rows["label"][:]])


def _number(value: Any) -> float | None:
    """A finite number, also one that a CSV file holds as text; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
