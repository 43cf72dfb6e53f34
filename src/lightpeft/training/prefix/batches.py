"""Batches that know their rows, and get what the frozen prefix gives for them where a step begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from lightpeft.training.prefix.blocks import STATES
from lightpeft.training.prefix.caching import Collate
from lightpeft.training.prefix.states import StateStore

ROWS = "prefix_rows"
"""Column with a row's number, and what a batch has of it: [batch], int64."""


@dataclass(frozen=True)
class Numbered:
    """A collator of numbered rows, whose batches say which rows they are."""

    collator: Collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What the collator makes, and the numbers of the rows."""
        batch = self.collator([{name: row[name] for name in row if name != ROWS} for row in rows])
        return {**batch, ROWS: torch.tensor([row[ROWS] for row in rows])}


def number_rows(rows: Dataset) -> Dataset:
    """The rows with their numbers."""
    return rows.add_column(ROWS, range(len(rows)))


def with_states(batch: Mapping[str, Any], store: StateStore | None) -> dict[str, Any]:
    """A batch without the numbers of its rows, but with their states where there are any."""
    given = dict(batch)
    numbers: Tensor | None = given.pop(ROWS, None)
    if store is None or numbers is None:
        return given
    return {**given, STATES: store.padded(numbers.tolist(), given["attention_mask"].cpu())}
