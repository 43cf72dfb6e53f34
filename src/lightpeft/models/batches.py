"""What of a batch a model reads, and what is for its loss alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

IGNORED = -100
"""Label of positions that count in no loss."""
SPAN_LABELS = ("start_positions", "end_positions")
"""Labels of an answer's first and last token."""
TEACHER_LOGITS = "teacher_logits"
"""What a teacher gives of a row, which its student learns beside the labels."""
LABELS = ("labels", *SPAN_LABELS, TEACHER_LOGITS)
"""What a batch has for the loss alone."""


def without_labels(batch: Mapping[str, T]) -> dict[str, T]:
    """What a model needs to answer."""
    return {name: values for name, values in batch.items() if name not in LABELS}
