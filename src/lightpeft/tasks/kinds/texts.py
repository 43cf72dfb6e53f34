"""What tasks on a text or a pair of texts share: columns, tokens and batches."""

from __future__ import annotations

from typing import Any, ClassVar

from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from lightpeft.config import TaskEntry
from lightpeft.console.bars import Progress, bar
from lightpeft.tasks.kinds.base import Task, check_strings
from lightpeft.tasks.tokens import Collator, in_chunks


class TextTask(Task):
    """One answer for a text or a pair of texts, given by a layer on top of the model."""

    columns: ClassVar[tuple[str, ...]] = ("text", "label")
    optional: ClassVar[tuple[str, ...]] = ("text_pair", "group")
    answers: ClassVar[tuple[str, ...]] = ("label",)

    @classmethod
    def check_inputs(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Texts are strings that are not blank."""
        for column in ("text", "text_pair"):
            if column == "text" or column in rows.column_names:
                check_strings(rows, column, entry, what)

    def encode_inputs(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress = bar
    ) -> Dataset:
        """Rows cut to `max_length` tokens, without labels."""
        pair = "text_pair" if "text_pair" in rows.column_names else None
        return encode_texts(rows, "text", pair, tokenizer, max_length, progress)

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
        """Batches padded to their longest row (or the next multiple)."""
        return Collator(DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple_of))


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
