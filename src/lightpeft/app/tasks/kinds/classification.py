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

from lightpeft.app.tasks.answers import Columns, Outcome, answers_of, rounded
from lightpeft.app.tasks.kinds.likelihood import LikelihoodTask
from lightpeft.app.tasks.kinds.options import OptionsTask
from lightpeft.app.tasks.kinds.texts import TextTask
from lightpeft.app.tasks.respondent import Respondent, finite_logits
from lightpeft.app.tasks.rows.columns import HIDDEN, place, source_column
from lightpeft.config import TaskEntry
from lightpeft.config.validation import short_repr
from lightpeft.errors import LightPeftError, require
from lightpeft.models.task_heads import CLASSIFICATION, TaskHead

INTEGER = re.compile(r"-?\d{1,18}")
"""A label that is sorted and read as a number: one of more digits is a name like any other."""
SHOWN_LABELS = 5
"""Labels that an error line lists at most."""
PROMPT = "{text}\nAnswer:"
"""What a language model reads where the entry has no prompt."""
PAIR_PROMPT = "{text}\n{text_pair}\nAnswer:"
"""The same for pairs of texts."""


class ClassificationTask(TextTask, OptionsTask):
    """One label a row; the label set is the entry's or, without one, that of all training rows."""

    head: ClassVar[TaskHead] = CLASSIFICATION
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1")

    @classmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Texts are strings that are not blank; labels are integers, strings or booleans."""
        cls.check_inputs(rows, entry, what)
        column = source_column(entry, "label")
        for number, value in enumerate(label_names(rows, entry, what), 1):
            require(value is not None, f"{place(what, number, column)}: there is no label; {HIDDEN}")

    @classmethod
    def label_set(cls, rows: Dataset, entry: TaskEntry) -> list[str]:
        """The entry's labels; else a hub data set's class names, integers by value, other names by alphabet."""
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
        """Training needs two classes at least; test labels must be known from training."""
        present = set(label_names(train, entry, "data.train"))
        if len(present) == 1:
            raise LightPeftError(
                f'all {len(train)} training rows have the one label "{present.pop()}" '
                f'(column "{source_column(entry, "label")}"); classification needs at least two'
            )
        unseen = sorted(set(label_names(test, entry, "data.test")) - set(labels))  # type: ignore[type-var]
        require(
            not unseen,
            f"data.test has labels that no training row has: {listed(unseen)}; training has {listed(labels)}",
        )

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """As `encode_inputs`, with `labels` as class numbers."""
        return self.encode_inputs(rows, tokenizer).add_column("labels", self.right_options(rows))

    def right_options(self, rows: Dataset) -> list[int]:
        """Every row's label as its class number.

        Raises:
            LightPeftError: a label that training has not.
        """
        number = {name: index for index, name in enumerate(self.labels)}
        names = label_names(rows, self.entry, "data")
        unknown = sorted({str(name) for name in names if name not in number})
        require(not unknown, f"these rows have labels that training has not: {', '.join(unknown[:SHOWN_LABELS])}")
        return [number[name] for name in names if name is not None]

    def options(self, row: Mapping[str, Any]) -> Sequence[str]:
        """The entry's label words; else the labels themselves."""
        return self.entry.words or self.labels

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The entry's, or one for a text or a pair of texts."""
        return self.entry.prompt or (PROMPT if row.get("text_pair") is None else PAIR_PROMPT)

    def answer(self, respondent: Respondent, encoded: Dataset) -> Outcome:
        """The class of the highest logit."""
        logits, labels = finite_logits(respondent, encoded), encoded["labels"][:]
        losses = cross_entropy(logits, torch.tensor(labels), reduction="none")
        answers = answers_of(encoded, logits.argmax(-1).tolist(), labels, logits.softmax(-1).numpy())
        return Outcome(replace(answers, scores={"loss": losses.double().numpy()}))

    def predict(self, respondent: Respondent, encoded: Dataset, rows: Dataset) -> Columns:
        """As `picked`."""
        return self.picked(list(finite_logits(respondent, encoded).softmax(-1).numpy()), rows)

    def picked(self, probabilities: Sequence[np.ndarray], rows: Dataset) -> Columns:
        """`label`, the most probable one, and every label's probability as `p_<label>`.

        Raises:
            LightPeftError: the model has more or fewer classes than there are labels.
        """
        table = np.stack(probabilities)
        named = f"the model tells {table.shape[-1]} classes apart, and its task has {len(self.labels)} labels"
        require(table.shape[-1] == len(self.labels), f"{named}; is it another task's?")
        labels = {"label": [self.labels[best] for best in table.argmax(-1)]}
        return {**labels, **{f"p_{name}": rounded(column) for name, column in zip(self.labels, table.T, strict=True)}}


class ClassificationByLikelihood(LikelihoodTask, ClassificationTask):
    """A language model's own probabilities of the label words decide."""


def listed(names: list[Any]) -> str:
    """The first names in quotes, for an error line."""
    return ", ".join(f'"{name}"' for name in names[:SHOWN_LABELS]) + (", ..." if names[SHOWN_LABELS:] else "")


def label_names(rows: Dataset, entry: TaskEntry, what: str) -> list[str | None]:
    """Every row's label as its name; None where there is none, or where it is hidden (-1, as hub data sets do)."""
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
        f"{where}: {short_repr(value)} is no label; use an integer, string or boolean",
    )
    if names is None or (str(value) in names and not numbered):
        return str(value)
    return _by_number(value, names, where)


def _by_number(value: Any, names: list[str], where: str) -> str | None:
    """The label that a number from 0 on means where label names are declared; None for -1."""
    known = isinstance(value, int) or INTEGER.fullmatch(value)
    require(
        known and -1 <= int(value) < len(names),
        f"{where}: {short_repr(value)} is no label of {listed(names)} (0, 1, ...)",
    )
    return names[int(value)] if int(value) >= 0 else None
