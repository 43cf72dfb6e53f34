"""Which tokens a task has, and how texts fare whose tokens are fewer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.tokens import ENCODE_ROWS

_TOKENS = ("input_ids", "unconditional_ids", "labels")
"""Columns of encoded rows that hold tokens, where they hold lists of integers."""


def task_tokens(task: Task, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that the training rows take, as rows to train on and as rows to be asked, all options included."""
    both = (task.encode(task.train, tokenizer), task.encode_test(task.train, tokenizer))
    return {token for encoded in both for row in _rows(encoded, _TOKENS) for token in row if token >= 0}


@dataclass(frozen=True)
class Coverage:
    """How texts are tokenised with fewer tokens."""

    before: float
    """Tokens a row with all tokens."""
    after: float
    """Tokens a row with those that stay."""
    identical: float
    """Part of the rows that are tokenised as before, in [0, 1]."""


def coverage(whole: Dataset, small: Dataset, kept: Sequence[int]) -> Coverage:
    """Compare rows that two tokenizers encoded.

    Args:
        whole: by that of the base.
        small: by that of some of its tokens.
        kept: these tokens, as ids of the base.
    """
    before = Counter(tuple(row) for row in _rows(whole, _TOKENS[:1]))
    after = Counter(tuple(kept[token] for token in row) for row in _rows(small, _TOKENS[:1]))
    # windows of long texts need not be as many
    return Coverage(_mean_length(before), _mean_length(after), (before & after).total() / max(after.total(), 1))


def _mean_length(rows: Counter[tuple[int, ...]]) -> float:
    return sum(len(row) * count for row, count in rows.items()) / max(rows.total(), 1)


def _rows(encoded: Dataset, columns: Sequence[str]) -> Iterator[list[int]]:
    """The tokens of each row; of several options one behind the other."""
    there = [name for name in columns if name in encoded.column_names]
    for chunk in encoded.select_columns(there).iter(ENCODE_ROWS):
        for values in _lists(chunk):
            yield [token for value in values for token in _flat(value)]


def _lists(chunk: Mapping[str, list[Any]]) -> Iterator[list[Any]]:
    for values in zip(*chunk.values(), strict=True):
        yield [value for value in values if isinstance(value, list)]


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for each in value:
            yield from _flat(each)
    elif isinstance(value, int):
        yield value
