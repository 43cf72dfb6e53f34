"""The base of tasks on a text or a pair of texts: columns, tokens and batches."""

from __future__ import annotations

from typing import Any, ClassVar

from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.rows.columns import check_strings
from lightpeft.app.tasks.tokens import Collator, in_chunks
from lightpeft.config import TaskEntry


class TextTask(Task):
    """One answer per text or pair of texts, by a head on top of the model."""

    columns: ClassVar[tuple[str, ...]] = ("text", "label")
    optional: ClassVar[tuple[str, ...]] = ("text_pair", "group")
    targets: ClassVar[tuple[str, ...]] = ("label",)

    @classmethod
    def check_inputs(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Raise `LightPeftError` unless texts are strings that are not blank."""
        for column in ("text", "text_pair"):
            if column == "text" or column in rows.column_names:
                check_strings(rows, column, entry, what)

    def encode_inputs(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Encode rows without labels, truncated to `data.max_length` tokens, the longer text of a pair first.

        Returns:
            Columns input_ids, attention_mask, length, and token_type_ids for pairs if the tokenizer has them (for a
            single text they are all 0, the default of models).
        """
        columns = [name for name in ("text", "text_pair") if name in rows.column_names]
        with_types = len(columns) > 1 and "token_type_ids" in tokenizer.model_input_names
        options = {"truncation": True, "max_length": self.config.max_length, "return_token_type_ids": with_types}

        def encode(chunk: dict[str, list[Any]], _: int) -> dict[str, list[Any]]:
            return dict(tokenizer(*(chunk[name] for name in columns), **options))

        return in_chunks(rows, encode)

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
        """Return the collator, which pads a batch to its longest row, or to the next multiple of `multiple_of`."""
        return Collator(DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple_of))
