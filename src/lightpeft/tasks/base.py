"""What a task is: its rows for training and for testing, and how they become batches."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lightpeft.config import DataConfig, TaskKind
from lightpeft.errors import LightPeftError, require
from lightpeft.tasks.progress import Progress, bar
from lightpeft.tasks.tokens import Collator


@dataclass
class Task(ABC):
    """One task with its rows; a subclass says which columns it needs and how it encodes them."""

    config: DataConfig
    train: Dataset
    """Rows to train on, as read."""
    test: Dataset
    """Rows to evaluate on, as read."""
    labels: list[str]
    """Label names, index = class number; empty without classes."""

    head: ClassVar[TaskKind]
    """The model head this task needs."""

    @classmethod
    @abstractmethod
    def check(cls, rows: Dataset, config: DataConfig, what: str) -> None:
        """Raise `LightPeftError` unless every row has what the task needs; `what` is "data.train" or "data.test"."""

    @classmethod
    @abstractmethod
    def label_set(cls, rows: Dataset, config: DataConfig) -> list[str]:
        """Label names in class order, from all training rows; empty without classes."""

    @classmethod
    @abstractmethod
    def check_split(cls, train: Dataset, test: Dataset, labels: list[str], config: DataConfig) -> None:
        """Raise `LightPeftError` if the rows chosen for training and testing don't fit together."""

    @abstractmethod
    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress = bar
    ) -> Dataset:
        """Columns input_ids, attention_mask, labels and length (and token_type_ids for pairs), one row a row."""

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
        """Batches padded to their longest row (or the next multiple) on the tokenizer's padding side."""


def check_column(rows: Dataset, column: str, setting: str, what: str) -> None:
    """Raise `LightPeftError` unless `rows` have `column`, named by `setting` ("data.text")."""
    if column in rows.column_names:
        return
    names = [name for name in rows.column_names if name]
    nearest = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
    hint = f'; did you mean "{nearest[0]}"?' if nearest else ""
    raise LightPeftError(f'{setting} is "{column}", but {what} has only the columns {", ".join(names)}{hint}')


def check_strings(rows: Dataset, column: str, setting: str, what: str, blank: bool = False) -> None:
    """Raise `LightPeftError` unless `column` is there and holds a string in every row, not blank unless allowed."""
    check_column(rows, column, setting, what)
    for number, value in enumerate(rows[column], 1):
        row = f'{what} row {number} (the header not counted), column "{column}"'
        require(value is not None, f"{row}: there is no value; fill it in or drop the row")
        require(isinstance(value, str), f"{row}: {value!r} is no text; {setting} must name a column of strings")
        require(blank or value.strip(), f"{row}: the text is blank; fill it in or drop the row")


def split_rows(train: Dataset, test: Dataset | None, config: DataConfig) -> tuple[Dataset, Dataset]:
    """Training and test rows after the hold-out split and the limits; a pure function of rows and config."""
    if test is None:
        kept = int(len(train) * (1 - config.test_fraction))
        require(kept >= 1, f"data.train has {len(train)} row(s); too few to hold out {config.test_fraction:g} of them")
        parts = train.train_test_split(
            config.test_fraction, seed=config.split_seed, keep_in_memory=True, load_from_cache_file=False
        )
        train, test = parts["train"], parts["test"]
    if config.limit_train is not None:
        require(config.limit_train >= 1, f"data.limit_train is {config.limit_train}; it must be at least 1")
        train = train.shuffle(seed=config.split_seed, keep_in_memory=True, load_from_cache_file=False)
        train = _first(train, config.limit_train)
    if config.limit_test is not None:
        require(config.limit_test >= 1, f"data.limit_test is {config.limit_test}; it must be at least 1")
        test = test.shuffle(seed=config.split_seed, keep_in_memory=True, load_from_cache_file=False)
        test = _first(test, config.limit_test)
    return train, test


def _first(rows: Dataset, count: int) -> Dataset:
    return rows.select(range(min(count, len(rows))))
