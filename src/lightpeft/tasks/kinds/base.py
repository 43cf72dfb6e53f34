"""What a task is: its rows for training and for testing, how they become batches, and what is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lightpeft.config import DataConfig, Head, TaskEntry
from lightpeft.console.bars import Progress, bar
from lightpeft.errors import require
from lightpeft.tasks.answers import Answers, Metric
from lightpeft.tasks.metrics import METRICS
from lightpeft.tasks.tokens import Collator


@dataclass
class Task(ABC):
    """One task with its rows in the columns of its kind; a subclass says how they are checked, encoded and batched."""

    config: DataConfig
    train: Dataset
    """Rows to train on."""
    test: Dataset
    """Rows to evaluate on."""
    labels: list[str]
    """Label names, index = class number; empty without classes."""
    entry: TaskEntry = field(default_factory=TaskEntry)
    """What the task was declared as."""
    more_tests: dict[str, Dataset] = field(default_factory=dict)
    """Further rows to evaluate on, by the prefix of their metrics."""

    head: ClassVar[Head]
    """The model head this task needs."""
    answering: ClassVar[str]
    """How a model with that head answers it: a key of `evaluation.ANSWERING`."""
    columns: ClassVar[tuple[str, ...]]
    """Columns of the kind that every row has."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Columns of the kind that a row may have."""
    answers: ClassVar[tuple[str, ...]] = ()
    """Those columns that say what is right; rows to predict on need none of them."""
    carried: ClassVar[tuple[str, ...]] = ("group",)
    """Columns, where rows have them, that encoded test rows keep: answers are compared with them, or by them."""
    cuts: ClassVar[bool] = True
    """Whether what is longer than `data.max_length` is lost."""
    default_metrics: ClassVar[tuple[str, ...]]
    """What is measured where the entry does not say."""

    @classmethod
    @abstractmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Raise `LightPeftError` unless every row has what the task needs; `what` names the rows in error lines."""

    @classmethod
    def check_inputs(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Raise `LightPeftError` unless every row to predict on has what the task needs to answer it."""
        for column in cls.columns:
            if column not in cls.answers:
                check_strings(rows, column, entry, what)

    @classmethod
    def label_set(cls, rows: Dataset, entry: TaskEntry) -> list[str]:
        """Label names in class order, from all training rows; empty without classes."""
        return []

    @classmethod
    def check_split(cls, train: Dataset, test: Dataset, labels: list[str], entry: TaskEntry) -> None:
        """Raise `LightPeftError` if the rows chosen for training and testing don't fit together."""
        return

    @abstractmethod
    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress = bar
    ) -> Dataset:
        """Rows to train on: input_ids, attention_mask, labels and length (and token_type_ids for pairs), one a row."""

    def encode_test(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress = bar
    ) -> Dataset:
        """Rows to evaluate on, one a row: as for training, and with what answers are compared with."""
        encoded = self.encode(rows, tokenizer, max_length, progress)
        return self.carry(rows, encoded)

    def carry(self, rows: Dataset, encoded: Dataset) -> Dataset:
        """Encoded rows with the `carried` columns of the rows they come from."""
        for name in self.carried:
            if name in rows.column_names:
                encoded = encoded.add_column(name, rows[name][:])
        return encoded

    @abstractmethod
    def encode_inputs(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress = bar
    ) -> Dataset:
        """Rows to predict on, which need no answers: as `encode_test` gives them, without labels."""

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
        """Batches padded to their longest row (or the next multiple) on the tokenizer's padding side."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what is measured, in `METRICS`."""
        return tuple(self.entry.metrics) or self.default_metrics

    @property
    def main_metric(self) -> str:
        """The value that stands for all when there is room for one."""
        return METRICS[self.metrics[0]].values[0]

    @property
    def measures(self) -> tuple[Metric, ...]:
        """What is measured, as functions of answers, the main metric first."""
        return tuple(METRICS[name].compute for name in self.metrics)

    def score(self, answers: Answers) -> dict[str, float]:
        """All that is measured of answers, the main metric first."""
        return {name: value for measure in self.measures for name, value in measure(answers).items()}


def source_column(entry: TaskEntry, column: str) -> str:
    """What the data call a column of the kind; its own name where it is put together of several."""
    source = entry.columns.get(column, column)
    return column if is_template(source) else source


def is_template(source: str) -> bool:
    """Whether what a column comes from is a template rather than a column's name."""
    return "{" in source


def place(what: str, number: int, column: str) -> str:
    """How error lines name a value: `number` counts from 1."""
    return f'{what} row {number} (the header not counted), column "{column}"'


def values(rows: Dataset, column: str, entry: TaskEntry, what: str) -> Iterator[tuple[str, Any]]:
    """The place and value of every row's `column`."""
    shown = source_column(entry, column)
    for number, value in enumerate(rows[column][:], 1):
        yield place(what, number, shown), value


HIDDEN = "fill it in, drop the row, or give a split whose answers are not hidden"
"""What to do about a row without an answer."""


def check_strings(rows: Dataset, column: str, entry: TaskEntry, what: str, blank: bool = False) -> None:
    """Raise `LightPeftError` unless `column` holds a string in every row, not blank unless allowed."""
    for where, value in values(rows, column, entry, what):
        check_text(value, where, blank)


def check_text(value: Any, where: str, blank: bool = False) -> None:
    """Raise `LightPeftError` unless a value is a string, not blank unless allowed."""
    require(value is not None, f"{where}: there is no value; fill it in or drop the row")
    require(isinstance(value, str), f"{where}: {value!r} is no text; this must be a column of strings")
    require(blank or value.strip(), f"{where}: the text is blank; fill it in or drop the row")


def split_rows(train: Dataset, test: Dataset | None, config: DataConfig) -> tuple[Dataset, Dataset]:
    """Training and test rows after the hold-out split and the limits; a pure function of rows and config."""
    if test is None:
        kept = int(len(train) * (1 - config.test_fraction))
        require(kept >= 1, f"data.train has {len(train)} row(s); too few to hold out {config.test_fraction:g} of them")
        parts = train.train_test_split(
            config.test_fraction, seed=config.split_seed, keep_in_memory=True, load_from_cache_file=False
        )
        train, test = parts["train"], parts["test"]
    return limited(train, config.limit_train, "limit_train", config), limited(
        test, config.limit_test, "limit_test", config
    )


def limited(rows: Dataset, limit: int | None, setting: str, config: DataConfig) -> Dataset:
    """So many rows, after a seeded shuffle; all of them without a limit."""
    if limit is None:
        return rows
    require(limit >= 1, f"data.{setting} is {limit}; it must be at least 1")
    shuffled = rows.shuffle(seed=config.split_seed, keep_in_memory=True, load_from_cache_file=False)
    return shuffled.select(range(min(limit, len(rows))))
