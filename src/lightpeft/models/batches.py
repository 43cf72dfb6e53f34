"""Entries of batches that a model reads, and entries for its loss only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

IGNORED = -100
"""Label of positions that the loss ignores."""
SPAN_LABELS = ("start_positions", "end_positions")
"""Names of the labels with an answer's first and last token."""
TEACHER_LOGITS = "teacher_logits"
"""Name of a teacher's logits for a row, which its student learns beside the labels."""
LABELS = ("labels", *SPAN_LABELS, TEACHER_LOGITS)
"""Names of a batch's entries for the loss only."""


def without_labels(batch: Mapping[str, T]) -> dict[str, T]:
    """Return a batch without its labels."""
    return {name: values for name, values in batch.items() if name not in LABELS}
