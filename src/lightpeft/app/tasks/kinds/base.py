"""What a task is: its rows for training and for testing, how they become batches, how a model answers them, and what
is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lightpeft.app.tasks.answers import Answers, Columns, Metric, Outcome
from lightpeft.app.tasks.metrics import METRICS
from lightpeft.app.tasks.respondent import Respondent
from lightpeft.app.tasks.rows.columns import check_strings
from lightpeft.app.tasks.tokens import Collator
from lightpeft.config import DataConfig, TaskEntry
from lightpeft.models.task_heads import TaskHead


@dataclass
class Task(ABC):
    """One task with its rows in the columns of its kind.

    A subclass is a kind, all of it: its columns and their checks, how rows become tokens and batches, how a model
    answers them, and how its answers are written. Rows are cut to `config.max_length` tokens.
    """

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

    head: ClassVar[TaskHead]
    """The model head this task needs."""
    columns: ClassVar[tuple[str, ...]]
    """Columns of the kind that every row has."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Columns of the kind that a row may have."""
    targets: ClassVar[tuple[str, ...]] = ()
    """Those columns that say what is right; rows to predict on need none of them."""
    carried: ClassVar[tuple[str, ...]] = ("group",)
    """Columns, where rows have them, that encoded test rows keep: answers are compared with them, or by them."""
    cuts: ClassVar[bool] = True
    """Whether what is longer than `data.max_length` is lost."""
    writes: ClassVar[bool] = False
    """Whether a model writes its answers token by token, which takes long."""
    default_metrics: ClassVar[tuple[str, ...]]
    """What is measured where the entry does not say."""

    @classmethod
    def sources(cls, named: Mapping[str, str]) -> dict[str, str]:
        """Column of the kind -> where it comes from in the data, a column or a template: its own name, unless `named`
        says another."""
        return {**named, **{column: column for column in cls.columns if column not in named}}

    @classmethod
    def from_texts(cls, rows: Dataset, column: str) -> Dataset:
        """Rows to predict on of which one column is enough, where it may hold plain texts."""
        return rows

    @classmethod
    @abstractmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Raise `LightPeftError` unless every row has what the task needs; `what` names the rows in error lines."""

    @classmethod
    def check_inputs(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Raise `LightPeftError` unless every row to predict on has what the task needs to answer it."""
        for column in cls.columns:
            if column not in cls.targets:
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
    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Rows to train on: input_ids, attention_mask, labels and length (and token_type_ids for pairs), one a row."""

    def encode_test(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Rows to evaluate on, one a row: as for training, and with what answers are compared with."""
        return self.carry(rows, self.encode(rows, tokenizer))

    def carry(self, rows: Dataset, encoded: Dataset) -> Dataset:
        """Encoded rows with the `carried` columns of the rows they come from."""
        for name in self.carried:
            if name in rows.column_names:
                encoded = encoded.add_column(name, rows[name][:])
        return encoded

    @abstractmethod
    def encode_inputs(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Rows to predict on, which need no answers: as `encode_test` gives them, without labels."""

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
        """Batches padded to their longest row (or the next multiple) on the tokenizer's padding side."""

    @abstractmethod
    def answer(self, respondent: Respondent, encoded: Dataset) -> Outcome:
        """A model's answers to what `encode_test` gave, beside what is right, and what was measured on the way.

        Raises:
            LightPeftError: there is no row or no token to predict, or the model's answers are NaN or infinite.
        """

    @abstractmethod
    def predict(self, respondent: Respondent, encoded: Dataset, rows: Dataset) -> Columns:
        """What is written of a model's answers to new rows.

        Args:
            encoded: what `encode_inputs` made of them.
            rows: in the columns of the kind.

        Raises:
            LightPeftError: the model's answers are NaN or infinite, or another task's.
        """

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
