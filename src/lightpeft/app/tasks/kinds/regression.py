"""Regression: one number for a text or a pair of texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch.nn.functional import mse_loss
from transformers import PreTrainedTokenizerBase

from lightpeft.app.tasks.answers import Columns, Outcome, answers_of, round_all
from lightpeft.app.tasks.kinds.texts import TextTask
from lightpeft.app.tasks.respondent import Respondent, finite_logits
from lightpeft.app.tasks.rows.columns import values
from lightpeft.config import TaskEntry
from lightpeft.config.validation import short_repr
from lightpeft.errors import require
from lightpeft.models.task_heads import REGRESSION, TaskHead


class RegressionTask(TextTask):
    """One number per row, learned by mean squared error."""

    head: ClassVar[TaskHead] = REGRESSION
    default_metrics: ClassVar[tuple[str, ...]] = ("pearson", "spearman", "mse")

    @classmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Raise `LightPeftError` unless texts are not blank and labels are numbers in the accepted range."""
        cls.check_inputs(rows, entry, what)
        for where, value in values(rows, "label", entry, what):
            require(
                _parse_number(value) is not None, f"{where}: {short_repr(value)} is not a valid number; {_LABEL_RANGE}"
            )

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return the columns of `encode_inputs` and `labels`, the number of each row as a float."""
        return self.encode_inputs(rows, tokenizer).add_column(
            "labels", [_parse_number(value) for value in rows["label"][:]]
        )

    def answer(self, respondent: Respondent, encoded: Dataset) -> Outcome:
        """Return the model's output per row, and its squared error."""
        predicted, labels = finite_logits(respondent, encoded).squeeze(-1), encoded["labels"][:]
        losses = mse_loss(predicted, torch.tensor(labels), reduction="none")
        answers = answers_of(encoded, predicted.tolist(), labels)
        return Outcome(replace(answers, scores={"loss": losses.double().numpy()}))

    def predict(self, respondent: Respondent, encoded: Dataset, rows: Dataset) -> Columns:
        """Return `value`, the model's output per row."""
        return {"value": round_all(finite_logits(respondent, encoded).squeeze(-1))}


_LARGEST_LABEL = 1e18
"""Largest absolute value of a label: the loss squares it in float32."""
_LABEL_RANGE = f"regression needs one in every row, from -{_LARGEST_LABEL:.0e} to {_LARGEST_LABEL:.0e}"


def _parse_number(value: Any) -> float | None:
    """Return a label as a float, also one stored as text; None if it is no number or too large."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= _LARGEST_LABEL else None
