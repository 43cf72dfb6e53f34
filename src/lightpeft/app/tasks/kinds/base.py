"""The base class of all tasks: training and test rows, their encoding and batches, a model's answers, and metrics."""

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

    A subclass is one kind. It declares and checks the columns, encodes rows, collates batches, computes a model's
    answers, and formats them for files. Rows are truncated to `config.max_length` tokens.

    Example:
        ```python
        task = load_task(DataConfig(task="classification", train="train.csv"))
        encoded = task.encode(task.train, tokenizer)  # input_ids, attention_mask, labels, length
        task.main_metric  # "accuracy"
        ```
    """

    config: DataConfig
    train: Dataset
    """Rows to train on."""
    test: Dataset
    """Rows to evaluate on."""
    labels: list[str]
    """Label names, index = class number; empty without classes."""
    entry: TaskEntry = field(default_factory=TaskEntry)
    """Declaration of the task."""
    more_tests: dict[str, Dataset] = field(default_factory=dict)
    """Prefix of the metrics -> further rows to evaluate on."""

    head: ClassVar[TaskHead]
    """Model head that the task needs."""
    columns: ClassVar[tuple[str, ...]]
    """Required columns."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Optional columns."""
    targets: ClassVar[tuple[str, ...]] = ()
    """Columns with the reference; rows to predict on need none of them."""
    carried: ClassVar[tuple[str, ...]] = ("group",)
    """Columns that encoded test rows keep, if rows have them: the metrics need them."""
    cuts: ClassVar[bool] = True
    """True if tokens beyond `data.max_length` are lost."""
    writes: ClassVar[bool] = False
    """True if a model generates its answers token by token, which is slow."""
    default_metrics: ClassVar[tuple[str, ...]]
    """Names of the metrics if the entry names none."""

    @classmethod
    def sources(cls, named: Mapping[str, str]) -> dict[str, str]:
        """Return column of the kind -> its source in the data (column or template); by default the same name.

        Args:
            named: sources that the user set, by column of the kind.
        """
        return {**named, **{column: column for column in cls.columns if column not in named}}

    @classmethod
    def from_texts(cls, rows: Dataset, column: str) -> Dataset:
        """Return rows to predict on, of a kind with one input column, which may hold plain texts."""
        return rows

    @classmethod
    @abstractmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Raise `LightPeftError` unless every row fits the kind; `what` names the rows in error messages."""

    @classmethod
    def check_inputs(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Raise `LightPeftError` unless the input columns of every row fit the kind; targets are not read."""
        for column in cls.columns:
            if column not in cls.targets:
                check_strings(rows, column, entry, what)

    @classmethod
    def label_set(cls, rows: Dataset, entry: TaskEntry) -> list[str]:
        """Return the label names in class order, from all training rows; empty without classes."""
        return []

    @classmethod
    def check_split(cls, train: Dataset, test: Dataset, labels: list[str], entry: TaskEntry) -> None:
        """Raise `LightPeftError` if the training and test rows do not fit together, such as in their labels."""
        return

    @abstractmethod
    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return encoded training rows: input_ids, attention_mask, labels, length (and token_type_ids for pairs)."""

    def encode_test(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return encoded test rows: the columns of `encode`, and the `carried` columns for the metrics."""
        return self.carry(rows, self.encode(rows, tokenizer))

    def carry(self, rows: Dataset, encoded: Dataset) -> Dataset:
        """Return the encoded rows with the `carried` columns of their source rows."""
        for name in self.carried:
            if name in rows.column_names:
                encoded = encoded.add_column(name, rows[name][:])
        return encoded

    @abstractmethod
    def encode_inputs(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return encoded rows to predict on: the columns of `encode_test` without labels."""

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
        """Return the collator, which pads a batch to its longest row, or to the next multiple of `multiple_of`."""

    @abstractmethod
    def answer(self, respondent: Respondent, encoded: Dataset) -> Outcome:
        """Return a model's answers to encoded test rows with the references, and further measured values.

        Args:
            respondent: the model.
            encoded: the result of `encode_test`.

        Raises:
            LightPeftError: there is no row or no token to predict, or the outputs are NaN or infinite.
        """

    @abstractmethod
    def predict(self, respondent: Respondent, encoded: Dataset, rows: Dataset) -> Columns:
        """Return the columns of a prediction file for new rows.

        Args:
            encoded: the result of `encode_inputs` for `rows`.
            rows: the rows, in the columns of the kind.

        Raises:
            LightPeftError: the outputs are NaN or infinite, or their shape is that of another task.
        """

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, keys of `METRICS`."""
        return tuple(self.entry.metrics) or self.default_metrics

    @property
    def main_metric(self) -> str:
        """Name of the value that stands for the task when there is room for one."""
        return METRICS[self.metrics[0]].values[0]

    @property
    def measures(self) -> tuple[Metric, ...]:
        """Metrics as functions of answers, the main metric first."""
        return tuple(METRICS[name].compute for name in self.metrics)

    def score(self, answers: Answers) -> dict[str, float]:
        """Return all metrics of the answers by name, the main metric first."""
        return {name: value for measure in self.measures for name, value in measure(answers).items()}
