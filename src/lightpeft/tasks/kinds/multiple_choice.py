"""Multiple choice: a context and its options, one of which is right."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from lightpeft.config import Head, TaskEntry
from lightpeft.console.bars import Progress, bar
from lightpeft.errors import require
from lightpeft.tasks.kinds.base import HIDDEN, Task, check_strings, check_text, values
from lightpeft.tasks.tokens import Collator, in_chunks


class MultipleChoiceTask(Task):
    """Every option is read behind the context, and a head scores it; the highest score is the answer.

    Rows have `context`, `options` (texts) and `answer` (index of the right option). They may have `ending` (what
    follows whichever option is put in) and, where several options are right, `names` (what options are called in
    answers) and `right` (the names of the right ones).
    """

    head: ClassVar[Head] = "multiple-choice"
    answering: ClassVar[str] = "multiple-choice"
    columns: ClassVar[tuple[str, ...]] = ("context", "options", "answer")
    optional: ClassVar[tuple[str, ...]] = ("ending", "names", "right", "group")
    answers: ClassVar[tuple[str, ...]] = ("answer", "right")
    carried: ClassVar[tuple[str, ...]] = ("group", "names", "right")
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    @classmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Contexts and options are strings that are not blank; answers are indices of options."""
        cls.check_inputs(rows, entry, what)
        counts = [len(options) for options in rows["options"]]
        for (where, value), count in zip(values(rows, "answer", entry, what), counts, strict=True):
            require(value is not None, f"{where}: there is no right option; {HIDDEN}")
            index = _index(value)
            known = index is not None and 0 <= index < count
            require(known, f"{where}: {value!r} is no right option's number; it lies from 0 to {count - 1}")

    @classmethod
    def check_inputs(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Contexts and options are strings that are not blank."""
        check_strings(rows, "context", entry, what)
        for where, options in values(rows, "options", entry, what):
            several = isinstance(options, list) and len(options) > 1
            require(several, f"{where}: {options!r} is no list of two or more options")
            for option in options:
                check_text(option, where)

    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress = bar
    ) -> Dataset:
        """As `encode_inputs`, with `labels` as the numbers of the right options."""
        encoded = self.encode_inputs(rows, tokenizer, max_length, progress)
        return encoded.add_column("labels", answer_indices(rows))

    def encode_inputs(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress = bar
    ) -> Dataset:
        """input_ids and attention_mask (and token_type_ids) as one list an option, each cut to `max_length` tokens.

        `length` is what a row costs in a batch: its longest option times its options.
        """
        with_types = "token_type_ids" in tokenizer.model_input_names

        def encode(chunk: dict[str, list[Any]], _: int) -> dict[str, list[Any]]:
            options = with_endings(chunk)
            contexts = [context for context, of_row in zip(chunk["context"], options, strict=True) for _ in of_row]
            flat = [option for of_row in options for option in of_row]
            tokens = tokenizer(contexts, flat, truncation=True, max_length=max_length, return_token_type_ids=with_types)
            return {name: nested(column, [len(of_row) for of_row in options]) for name, column in tokens.items()}

        return in_chunks(rows, encode, progress, length=lambda options: len(options) * max(map(len, options)))

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
        """Batches [rows, most options, longest option]; rows with fewer get empty options, which are never right."""
        pad = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple_of)
        empty = tokenizer("", return_token_type_ids="token_type_ids" in tokenizer.model_input_names)
        empty = {name: ids or [tokenizer.pad_token_id] for name, ids in empty.items()}
        return Collator(_OptionPadding(pad, dict(empty)))


class _OptionPadding:
    """Pads rows of options: first their number, then their lengths."""

    def __init__(self, pad: DataCollatorWithPadding, empty: dict[str, list[int]]) -> None:
        self.pad, self.empty = pad, empty

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        most = max(len(row["input_ids"]) for row in rows)
        names = [name for name in self.empty if name in rows[0]]
        flat = [
            {name: row[name][option] if option < len(row[name]) else self.empty[name] for name in names}
            for row in rows
            for option in range(most)
        ]
        batch = {name: value.view(len(rows), most, -1) for name, value in self.pad(flat).items()}
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch


def nested(values: list[Any], counts: list[int]) -> list[list[Any]]:
    """A flat list cut into rows of so many items."""
    items = iter(values)
    return [[next(items) for _ in range(count)] for count in counts]


def with_endings(chunk: dict[str, list[Any]]) -> list[list[str]]:
    """Options as they follow the context: with the row's ending, where there is one."""
    endings = chunk.get("ending") or [None] * len(chunk["options"])
    return [
        [f"{option} {ending}" if ending else option for option in options]
        for options, ending in zip(chunk["options"], endings, strict=True)
    ]


def answer_indices(rows: Dataset) -> list[int]:
    """Every row's right option."""
    return [index for index in map(_index, rows["answer"][:]) if index is not None]


def _index(value: Any) -> int | None:
    """An index, also one that a CSV file holds as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return None
    try:
        return int(value)
    except ValueError:
        return None
