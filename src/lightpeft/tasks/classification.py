"""Classification of a text or a pair of texts."""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

from datasets import ClassLabel, Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from lightpeft.config import Head, TaskEntry
from lightpeft.errors import LightPeftError, require
from lightpeft.tasks.base import HIDDEN, Task, check_strings, place, source_column
from lightpeft.tasks.progress import Progress, bar
from lightpeft.tasks.tokens import Collator, in_chunks

INTEGER = re.compile(r"-?\d+")
SHOWN_LABELS = 5
"""Labels that an error line lists at most."""


class ClassificationTask(Task):
    """One label a row; the label set is the entry's or, without one, that of all training rows."""

    head: ClassVar[Head] = "classification"
    answering: ClassVar[str] = "classification"
    columns: ClassVar[tuple[str, ...]] = ("text", "label")
    optional: ClassVar[tuple[str, ...]] = ("text_pair", "group")
    answers: ClassVar[tuple[str, ...]] = ("label",)
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1")

    @classmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Texts are strings that are not blank; labels are integers, strings or booleans."""
        check_texts(rows, entry, what)
        shown = source_column(entry, "label")
        for number, value in enumerate(label_names(rows, entry, what), 1):
            require(value is not None, f"{place(what, number, shown)}: there is no label; {HIDDEN}")

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

    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress = bar
    ) -> Dataset:
        """Rows cut to `max_length` tokens, with `labels` as class numbers."""
        encoded = self.encode_inputs(rows, tokenizer, max_length, progress)
        return encoded.add_column("labels", self.class_numbers(rows))

    def encode_inputs(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress = bar
    ) -> Dataset:
        """Rows cut to `max_length` tokens, without labels."""
        pair = "text_pair" if "text_pair" in rows.column_names else None
        return encode_texts(rows, "text", pair, tokenizer, max_length, progress)

    def class_numbers(self, rows: Dataset) -> list[int]:
        """Every row's label as its class number.

        Raises:
            LightPeftError: a label that training has not.
        """
        number = {name: index for index, name in enumerate(self.labels)}
        names = label_names(rows, self.entry, "data")
        unknown = sorted({str(name) for name in names if name not in number})
        require(not unknown, f"these rows have labels that training has not: {', '.join(unknown[:SHOWN_LABELS])}")
        return [number[name] for name in names if name is not None]

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
        """Batches padded to their longest row (or the next multiple)."""
        return text_collator(tokenizer, multiple_of)


def listed(names: list[Any]) -> str:
    """The first names in quotes, for an error line."""
    return ", ".join(f'"{name}"' for name in names[:SHOWN_LABELS]) + (", ..." if names[SHOWN_LABELS:] else "")


def check_texts(rows: Dataset, entry: TaskEntry, what: str) -> None:
    """Raise `LightPeftError` unless `text`, and `text_pair` where there is one, are strings that are not blank."""
    for column in ("text", "text_pair"):
        if column == "text" or column in rows.column_names:
            check_strings(rows, column, entry, what)


def label_names(rows: Dataset, entry: TaskEntry, what: str) -> list[str | None]:
    """Every row's label as its name; None where there is none, or where it is hidden (-1, as hub data sets do)."""
    feature, shown = rows.features["label"], source_column(entry, "label")
    names = list(entry.labels) or (feature.names if isinstance(feature, ClassLabel) else None)
    return [_label_name(value, names, place(what, i, shown)) for i, value in enumerate(rows["label"][:], 1)]


def _label_name(value: Any, names: list[str] | None, where: str) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # integers become floats where a table had gaps
    require(isinstance(value, (bool, int, str)), f"{where}: {value!r} is no label; use an integer, string or boolean")
    return str(value) if names is None else _declared(value, names, where)


def _declared(value: Any, names: list[str], where: str) -> str | None:
    """The label that a value means where label names are declared: their own number, or the name itself."""
    if isinstance(value, str) and value in names:
        return value
    known = isinstance(value, int) or INTEGER.fullmatch(value)
    require(known and -1 <= int(value) < len(names), f"{where}: {value!r} is no label of {listed(names)} (0, 1, ...)")
    return names[int(value)] if int(value) >= 0 else None


def encode_texts(
    rows: Dataset,
    text: str,
    text_pair: str | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    progress: Progress = bar,
) -> Dataset:
    """Tokens of column `text` (and `text_pair`), cut to `max_length`, the longer text first; no labels.

    Returns:
        Columns input_ids, attention_mask, length, and token_type_ids for pairs if the tokenizer has them (for a
        single text they are all 0, which is what models assume without them).
    """
    columns = [text] if text_pair is None else [text, text_pair]
    with_types = text_pair is not None and "token_type_ids" in tokenizer.model_input_names

    def encode(chunk: dict[str, list[Any]], _: int) -> dict[str, list[Any]]:
        texts = [chunk[name] for name in columns]
        return dict(tokenizer(*texts, truncation=True, max_length=max_length, return_token_type_ids=with_types))

    return in_chunks(rows, encode, progress)


def text_collator(tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
    """Batches of encoded texts, with or without class labels."""
    return Collator(DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple_of))
