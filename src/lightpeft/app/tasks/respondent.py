"""The interface through which a task reads a model: outputs of batches, and generated texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightpeft.app.tasks.answers import require_finite
from lightpeft.errors import LightPeftError
from lightpeft.models.batches import IGNORED


class Respondent(Protocol):
    """A model that answers encoded rows; `evaluation.respondent` implements it for a live model."""

    def outputs(self, encoded: Dataset, description: str) -> Iterator[tuple[Sequence[int], dict[str, Tensor], Any]]:
        """Yield row numbers, their padded batch on the host, and the model's output for it; in any order of rows.

        Raises:
            LightPeftError: there is no row.
        """
        ...

    def next_logits(self, encoded: Dataset, description: str) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        """Yield row numbers, next-token logits, and their labels, for rows with one label per token; in any order.

        Logits are [rows, places, vocabulary] on the model's device, labels [rows, places] on the host. Places are those
        whose next token has a label in some row of the batch; a row without a label there has -100. Rows may say by
        numbers in a column `prompt` which of them begin with the same tokens, up to the first label.

        Raises:
            LightPeftError: there is no row.
        """
        ...

    def texts(self, encoded: Dataset, max_new_tokens: int, *, one_line: bool = False) -> list[str]:
        """Return the text that the model generates after every row's tokens.

        Raises:
            LightPeftError: there is no row, or logits of a chosen token are not finite.
        """
        ...


class OutputsOnly:
    """Base of a `Respondent` that has outputs of a task's own head, and generates no text."""

    def next_logits(self, encoded: Dataset, description: str) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        """Raise `LightPeftError`: there is no language-model head."""
        raise LightPeftError("there is no language-model head to score tokens with; use a task with a head of its own")

    def texts(self, encoded: Dataset, max_new_tokens: int, *, one_line: bool = False) -> list[str]:
        """Raise `LightPeftError`: there is no language-model head."""
        raise LightPeftError("there is no language-model head to generate text; use a task with a head of its own")


def row_logits(respondent: Respondent, encoded: Dataset) -> list[Tensor]:
    """Return every row's logits, float32 on the CPU, padded as in its batch."""
    logits = [torch.empty(0)] * len(encoded)
    for rows, _, output in respondent.outputs(encoded, "Predicting"):
        for row, of_row in zip(rows, output.logits.float().cpu(), strict=True):
            logits[row] = of_row
    return logits


def finite_logits(respondent: Respondent, encoded: Dataset) -> Tensor:
    """Return all logits, float32 [rows, classes] on the CPU.

    Raises:
        LightPeftError: there is no row, or logits are not finite.
    """
    logits = torch.stack(row_logits(respondent, encoded))
    require_finite(logits.isfinite().all(-1).numpy())
    return logits


def token_sums(respondent: Respondent, encoded: Dataset) -> np.ndarray:
    """Return, per row, the summed cross-entropy (nats), correct tokens, and labeled tokens: float64 [rows, 3]."""
    sums = np.zeros((len(encoded), 3))
    for rows, logits, labels in respondent.next_logits(encoded, "Evaluating"):
        # row by row: copies of a batch's logits [rows, tokens, vocabulary] would take more memory than the model did
        of_batch = [_row_sums(*of_row) for of_row in zip(logits, labels, strict=True)]
        sums[list(rows)] = torch.stack(of_batch).cpu().numpy()  # one host copy a batch
    return sums


def _row_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy, correct tokens and labeled tokens of one row: float64 [3].

    Args:
        logits: [tokens, vocabulary].
        labels: [tokens], on the host.
    """
    places = (labels != IGNORED).nonzero().flatten()
    picked, targets = logits[places.to(logits.device)].float(), labels[places].to(logits.device)
    losses = cross_entropy(picked, targets, reduction="none")
    right = (picked.argmax(-1) == targets).sum()
    return torch.stack([losses.double().sum(), right.double(), torch.full_like(right, len(targets)).double()])
