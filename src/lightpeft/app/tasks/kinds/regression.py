"""Regression: a number for a text or a pair of texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch.nn.functional import mse_loss
from transformers import PreTrainedTokenizerBase

from lightpeft.app.tasks.answers import Columns, Outcome, answers_of, rounded
from lightpeft.app.tasks.kinds.texts import TextTask
from lightpeft.app.tasks.respondent import Respondent, finite_logits
from lightpeft.app.tasks.rows.columns import values
from lightpeft.config import TaskEntry
from lightpeft.config.validation import short_repr
from lightpeft.errors import require
from lightpeft.models.task_heads import REGRESSION, TaskHead


class RegressionTask(TextTask):
    """One number a row, learned by mean squared error."""

    head: ClassVar[TaskHead] = REGRESSION
    default_metrics: ClassVar[tuple[str, ...]] = ("pearson", "spearman", "mse")

    @classmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Texts are strings that are not blank; labels are numbers that can be learned."""
        cls.check_inputs(rows, entry, what)
        for where, value in values(rows, "label", entry, what):
            require(_number(value) is not None, f"{where}: {short_repr(value)} is no number; {_NEEDS}")

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """As `encode_inputs`, with `labels` as floats."""
        return self.encode_inputs(rows, tokenizer).add_column("labels", [_number(value) for value in rows["label"][:]])

    def answer(self, respondent: Respondent, encoded: Dataset) -> Outcome:
        """The one output."""
        predicted, labels = finite_logits(respondent, encoded).squeeze(-1), encoded["labels"][:]
        losses = mse_loss(predicted, torch.tensor(labels), reduction="none")
        answers = answers_of(encoded, predicted.tolist(), labels)
        return Outcome(replace(answers, scores={"loss": losses.double().numpy()}))

    def predict(self, respondent: Respondent, encoded: Dataset, rows: Dataset) -> Columns:
        """`value`, the one output."""
        return {"value": rounded(finite_logits(respondent, encoded).squeeze(-1))}


_LARGEST = 1e18
"""What a label may be: the loss squares it, in float32."""
_NEEDS = f"regression needs one in every row, from -{_LARGEST:.0e} to {_LARGEST:.0e}"


def _number(value: Any) -> float | None:
    """A number that can be learned, also one that a CSV file holds as text; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= _LARGEST else None
