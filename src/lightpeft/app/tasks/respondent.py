"""What a kind of task sees of a model that it asks: outputs of batches, and texts that it writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightpeft.app.tasks.answers import require_finite
from lightpeft.models.batches import IGNORED


class Respondent(Protocol):
    """A model that can be asked; `evaluation.respondent` has the live one."""

    def outputs(self, encoded: Dataset, description: str) -> Iterator[tuple[Sequence[int], dict[str, Tensor], Any]]:
        """Row numbers, the padded batch of them on the host, and what the model gives for it; in any order of rows.

        Raises:
            LightPeftError: there is no row.
        """
        ...

    def next_logits(self, encoded: Dataset, description: str) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        """Of rows with a label a token: row numbers, logits, and the labels that these are to predict; in any order.

        Logits are [rows, places, vocabulary] where the model is, labels [rows, places] on the host. Places are those at
        which the next token has a label in some row of the batch; where it has none in a row, its label is -100.

        Raises:
            LightPeftError: there is no row.
        """
        ...

    def texts(self, encoded: Dataset, max_new_tokens: int, *, one_line: bool = False) -> list[str]:
        """What the model writes behind every row's tokens.

        Raises:
            LightPeftError: there is no row, or a token was picked of logits that are not finite.
        """
        ...


def row_logits(respondent: Respondent, encoded: Dataset) -> list[Tensor]:
    """Every row's logits, float32 on the CPU, as wide as its batch has them."""
    logits = [torch.empty(0)] * len(encoded)
    for rows, _, output in respondent.outputs(encoded, "Predicting"):
        for row, of_row in zip(rows, output.logits.float().cpu(), strict=True):
            logits[row] = of_row
    return logits


def finite_logits(respondent: Respondent, encoded: Dataset) -> Tensor:
    """Every row's logits, float32 [rows, classes] on the CPU.

    Raises:
        LightPeftError: there is no row, or logits are not finite.
    """
    logits = torch.stack(row_logits(respondent, encoded))
    require_finite(logits.isfinite().all(-1).numpy())
    return logits


def token_sums(respondent: Respondent, encoded: Dataset) -> np.ndarray:
    """Over every row's labelled tokens: cross-entropy in nats, tokens predicted right, tokens. Float64 [rows, 3]."""
    sums = np.zeros((len(encoded), 3))
    for rows, logits, labels in respondent.next_logits(encoded, "Evaluating"):
        # row by row: copies of a batch's logits [rows, tokens, vocabulary] would take more memory than the model did
        of_batch = [_row_sums(*of_row) for of_row in zip(logits, labels, strict=True)]
        sums[list(rows)] = torch.stack(of_batch).cpu().numpy()  # one host copy a batch
    return sums


def _row_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """The same of one row, on the device of its logits [tokens, vocabulary]; labels are on the host."""
    places = (labels != IGNORED).nonzero().flatten()
    picked, targets = logits[places.to(logits.device)].float(), labels[places].to(logits.device)
    losses = cross_entropy(picked, targets, reduction="none")
    right = (picked.argmax(-1) == targets).sum()
    return torch.stack([losses.double().sum(), right.double(), torch.full_like(right, len(targets)).double()])
