"""The tokens that occur in the training rows of a task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.tokens import ENCODE_ROWS

_TOKENS = ("input_ids", "labels")
"""Columns of encoded rows that hold token ids, if their values are lists of integers."""


def task_tokens(task: Task, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of all tokens in the training rows, encoded for training and for evaluation, with all options."""
    both = (task.encode(task.train, tokenizer), task.encode_test(task.train, tokenizer))
    return {token for encoded in both for token in _tokens_of(encoded) if token >= 0}


def _tokens_of(encoded: Dataset) -> Iterator[int]:
    there = [name for name in _TOKENS if name in encoded.column_names]
    for chunk in encoded.select_columns(there).iter(ENCODE_ROWS):
        for column in chunk.values():
            yield from _flat([value for value in column if isinstance(value, list)])


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for each in value:
            yield from _flat(each)
    elif isinstance(value, int):
        yield value
