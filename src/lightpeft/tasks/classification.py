"""Classification of a text or a pair of texts."""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

from datasets import ClassLabel, Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from lightpeft.config import DataConfig, TaskKind
from lightpeft.errors import LightPeftError, require
from lightpeft.tasks.base import Task, check_column, check_strings
from lightpeft.tasks.progress import Progress, bar
from lightpeft.tasks.tokens import Collator, in_chunks

INTEGER = re.compile(r"-?\d+")
SHOWN_LABELS = 5
"""Labels that an error line lists at most."""


class ClassificationTask(Task):
    """One label a row; the label set is that of all training rows."""

    head: ClassVar[TaskKind] = "classification"

    @classmethod
    def check(cls, rows: Dataset, config: DataConfig, what: str) -> None:
        """Texts are strings that are not blank; labels are integers, strings or booleans."""
        check_strings(rows, config.text, "data.text", what)
        if config.text_pair is not None:
            check_strings(rows, config.text_pair, "data.text_pair", what)
        check_column(rows, config.label, "data.label", what)
        for number, value in enumerate(label_names(rows, config.label, what), 1):
            place = f'{what} row {number} (the header not counted), column "{config.label}"'
            require(value is not None, f"{place}: there is no label; fill it in or drop the row")

    @classmethod
    def label_set(cls, rows: Dataset, config: DataConfig) -> list[str]:
        """Integers by value, other names by alphabet; a hub data set's own class names keep their order."""
        feature = rows.features[config.label]
        if isinstance(feature, ClassLabel):
            return list(feature.names)
        names = {name for name in label_names(rows, config.label, "data.train") if name is not None}
        integers = all(INTEGER.fullmatch(name) for name in names)
        return sorted(names, key=lambda name: (int(name), name)) if integers else sorted(names)

    @classmethod
    def check_split(cls, train: Dataset, test: Dataset, labels: list[str], config: DataConfig) -> None:
        """Training needs two classes at least; test labels must be known from training."""
        present = set(label_names(train, config.label, "data.train"))
        if len(present) == 1:
            raise LightPeftError(
                f'all {len(train)} training rows have the one label "{present.pop()}" (column "{config.label}"); '
                "classification needs at least two"
            )
        unseen = sorted(set(label_names(test, config.label, "data.test")) - set(labels))  # type: ignore[type-var]
        listed = ", ".join(f'"{name}"' for name in unseen[:SHOWN_LABELS]) + (", ..." if unseen[SHOWN_LABELS:] else "")
        known = ", ".join(f'"{name}"' for name in labels[:SHOWN_LABELS]) + (", ..." if labels[SHOWN_LABELS:] else "")
        require(not unseen, f"data.test has labels that no training row has: {listed}; training has {known}")

    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress = bar
    ) -> Dataset:
        """Rows cut to `max_length` tokens, with `labels` as class numbers."""
        encoded = encode_texts(rows, self.config.text, self.config.text_pair, tokenizer, max_length, progress)
        number = {name: index for index, name in enumerate(self.labels)}
        names = label_names(rows, self.config.label, "data")
        unknown = sorted({str(name) for name in names if name not in number})
        require(not unknown, f"these rows have labels that training has not: {', '.join(unknown[:SHOWN_LABELS])}")
        return encoded.add_column("labels", [number[name] for name in names if name is not None])

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
        """Batches padded to their longest row (or the next multiple)."""
        return text_collator(tokenizer, multiple_of)


def label_names(rows: Dataset, column: str, what: str) -> list[str | None]:
    """Every row's label as its name; None where there is none."""
    feature = rows.features[column]
    names = feature.names if isinstance(feature, ClassLabel) else None
    return [_label_name(value, names, f'{what} row {i}, column "{column}"') for i, value in enumerate(rows[column], 1)]


def _label_name(value: Any, names: list[str] | None, place: str) -> str | None:
    if names is not None:
        # Hub data sets mark hidden labels with -1.
        return names[value] if value is not None and value >= 0 else None
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # integers become floats where a table had gaps
    require(isinstance(value, (bool, int, str)), f"{place}: {value!r} is no label; use an integer, string or boolean")
    return str(value)


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
