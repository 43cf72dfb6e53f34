"""Classification of a text or a pair of texts, by a head or by the likelihood of label words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from lightpeft.app.tasks.answers import Columns, Outcome, answers_of, round_all
from lightpeft.app.tasks.kinds.likelihood import LikelihoodTask
from lightpeft.app.tasks.kinds.options import OptionsTask
from lightpeft.app.tasks.kinds.texts import TextTask
from lightpeft.app.tasks.respondent import Respondent, finite_logits
from lightpeft.app.tasks.rows.columns import HIDDEN_ANSWER_REMEDY, place, source_column
from lightpeft.config import TaskEntry
from lightpeft.config.validation import short_repr
from lightpeft.errors import LightPeftError, require
from lightpeft.models.task_heads import CLASSIFICATION, TaskHead

INTEGER = re.compile(r"-?\d{1,18}")
"""Labels that are sorted and read as numbers; those with more digits are names."""
SHOWN_LABELS = 5
"""Most labels that an error message lists."""
TEXT_PROMPT = "{text}\nAnswer:"
"""Default prompt for a language model."""
PAIR_PROMPT = "{text}\n{text_pair}\nAnswer:"
"""Default prompt for a language model that classifies pairs of texts."""


class ClassificationTask(TextTask, OptionsTask):
    """One label per row; the label set is the entry's or, without one, that of all training rows."""

    head: ClassVar[TaskHead] = CLASSIFICATION
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1")

    @classmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Raise `LightPeftError` unless texts are not blank and labels are integers, strings or booleans."""
        cls.check_inputs(rows, entry, what)
        column = source_column(entry, "label")
        for number, value in enumerate(label_names(rows, entry, what), 1):
            require(value is not None, f"{place(what, number, column)}: the label is missing; {HIDDEN_ANSWER_REMEDY}")

    @classmethod
    def label_set(cls, rows: Dataset, entry: TaskEntry) -> list[str]:
        """Return the entry's labels, else a hub data set's class names, else labels sorted (integers by value)."""
        feature = rows.features["label"]
        if entry.labels:
            return list(entry.labels)
        if isinstance(feature, ClassLabel):
            return list(feature.names)
        names = {name for name in label_names(rows, entry, "data.train") if name is not None}
        integers = all(INTEGER.fullmatch(name) for name in names)
        return sorted(names, key=lambda name: (int(name), name)) if integers else sorted(names)

    @classmethod
    def check_split(cls, train: Dataset, test: Dataset, labels: list[str], entry: TaskEntry) -> None:
        """Raise `LightPeftError` unless training rows have two classes and test labels occur in training."""
        present = set(label_names(train, entry, "data.train"))
        if len(present) == 1:
            raise LightPeftError(
                f'all {len(train)} training rows have the same label "{present.pop()}" '
                f'(column "{source_column(entry, "label")}"); classification needs at least two labels'
            )
        unseen = sorted(set(label_names(test, entry, "data.test")) - set(labels))  # type: ignore[type-var]
        require(
            not unseen,
            f"data.test has labels that training lacks: {quote_labels(unseen)}; training has {quote_labels(labels)}",
        )

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return the columns of `encode_inputs` and `labels`, the class number of each row."""
        return self.encode_inputs(rows, tokenizer).add_column("labels", self.right_options(rows))

    def right_options(self, rows: Dataset) -> list[int]:
        """Return the class number of every row.

        Raises:
            LightPeftError: a label does not occur in training.
        """
        number = {name: index for index, name in enumerate(self.labels)}
        names = label_names(rows, self.entry, "data")
        unknown = sorted({str(name) for name in names if name not in number})
        require(
            not unknown,
            f"rows have labels that training lacks: {', '.join(unknown[:SHOWN_LABELS])}; correct or drop them",
        )
        return [number[name] for name in names if name is not None]

    def options(self, row: Mapping[str, Any]) -> Sequence[str]:
        """Return the entry's label words, else the labels themselves."""
        return self.entry.words or self.labels

    def prompt(self, row: Mapping[str, Any]) -> str:
        """Return the entry's prompt, else the default for a text or a pair of texts."""
        return self.entry.prompt or (TEXT_PROMPT if row.get("text_pair") is None else PAIR_PROMPT)

    def answer(self, respondent: Respondent, encoded: Dataset) -> Outcome:
        """Return the class with the highest logit, the softmax probabilities, and the cross-entropy (nats) per row."""
        logits, labels = finite_logits(respondent, encoded), encoded["labels"][:]
        losses = cross_entropy(logits, torch.tensor(labels), reduction="none")
        answers = answers_of(encoded, logits.argmax(-1).tolist(), labels, logits.softmax(-1).numpy())
        return Outcome(replace(answers, scores={"loss": losses.double().numpy()}))

    def predict(self, respondent: Respondent, encoded: Dataset, rows: Dataset) -> Columns:
        """Return `label`, the most probable one, and the probability of every label as `p_<label>`."""
        return self.picked(list(finite_logits(respondent, encoded).softmax(-1).numpy()), rows)

    def picked(self, probabilities: Sequence[np.ndarray], rows: Dataset) -> Columns:
        """Return `label`, the most probable one, and the probability of every label as `p_<label>`.

        Raises:
            LightPeftError: the model's number of classes is not the task's number of labels.
        """
        table = np.stack(probabilities)
        named = f"the model has {table.shape[-1]} classes, but its task has {len(self.labels)} labels"
        require(table.shape[-1] == len(self.labels), f"{named}; give a model that was trained for this task")
        labels = {"label": [self.labels[best] for best in table.argmax(-1)]}
        return {**labels, **{f"p_{name}": round_all(column) for name, column in zip(self.labels, table.T, strict=True)}}


class ClassificationByLikelihood(LikelihoodTask, ClassificationTask):
    """Classification by a language model's probabilities of the label words."""


def quote_labels(names: list[Any]) -> str:
    """Return the first `SHOWN_LABELS` names in quotes, for an error message."""
    return ", ".join(f'"{name}"' for name in names[:SHOWN_LABELS]) + (", ..." if names[SHOWN_LABELS:] else "")


def label_names(rows: Dataset, entry: TaskEntry, what: str) -> list[str | None]:
    """Return the label name of every row; None if it is missing or hidden (-1, as in hub data sets)."""
    feature, column = rows.features["label"], source_column(entry, "label")
    numbered = isinstance(feature, ClassLabel)
    names = list(entry.labels) or (list(feature.names) if numbered else None)
    return [_label_name(value, names, numbered, place(what, i, column)) for i, value in enumerate(rows["label"][:], 1)]


def _label_name(value: Any, names: list[str] | None, numbered: bool, where: str) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # integers become floats where a table had gaps
    require(
        isinstance(value, (bool, int, str)),
        f"{where}: {short_repr(value)} is not a label; use an integer, string or boolean",
    )
    if names is None or (str(value) in names and not numbered):
        return str(value)
    return _label_by_number(value, names, where)


def _label_by_number(value: Any, names: list[str], where: str) -> str | None:
    """Return the declared label with that number, from 0; None for -1."""
    known = isinstance(value, int) or INTEGER.fullmatch(value)
    require(
        known and -1 <= int(value) < len(names),
        f"{where}: {short_repr(value)} is not a label; use {quote_labels(names)} (0, 1, ...)",
    )
    return names[int(value)] if int(value) >= 0 else None
