"""Multiple choice: a context and its options, one of which is right, by a head or by likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from lightpeft.app.tasks.answers import Columns, Outcome, require_finite, round_all
from lightpeft.app.tasks.kinds.likelihood import LikelihoodTask
from lightpeft.app.tasks.kinds.options import OptionsTask, chosen_answers, split_by_counts
from lightpeft.app.tasks.respondent import Respondent, row_logits
from lightpeft.app.tasks.rows.columns import HIDDEN_ANSWER_REMEDY, check_strings, check_text, values
from lightpeft.app.tasks.tokens import Collator, in_chunks
from lightpeft.config import TaskEntry
from lightpeft.config.validation import short_repr
from lightpeft.errors import require
from lightpeft.models.task_heads import MULTIPLE_CHOICE, TaskHead

CHOICE_PROMPT = "Question: {context}\nAnswer:"
"""Default prompt for a language model."""


class MultipleChoiceTask(OptionsTask):
    """A head scores every option after the context; the option with the highest score is the answer.

    Rows have `context`, `options` (texts) and `answer` (index of the right option). They may have `ending` (text after
    every option) and, if several options are right, `names` (the options' names in answers) and `right` (names of the
    right ones).
    """

    head: ClassVar[TaskHead] = MULTIPLE_CHOICE
    columns: ClassVar[tuple[str, ...]] = ("context", "options", "answer")
    optional: ClassVar[tuple[str, ...]] = ("ending", "names", "right", "group")
    targets: ClassVar[tuple[str, ...]] = ("answer", "right")
    carried: ClassVar[tuple[str, ...]] = ("group", "names", "right")
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    @classmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Raise `LightPeftError` unless contexts and options are not blank and answers are indices of options."""
        cls.check_inputs(rows, entry, what)
        counts = [len(options) for options in rows["options"]]
        for (where, value), count in zip(values(rows, "answer", entry, what), counts, strict=True):
            require(value is not None, f"{where}: the right option is missing; {HIDDEN_ANSWER_REMEDY}")
            index = _parse_index(value)
            known = index is not None and 0 <= index < count
            require(known, f"{where}: {short_repr(value)} is not the index of an option; use 0 to {count - 1}")

    @classmethod
    def check_inputs(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Raise `LightPeftError` unless contexts and options are strings that are not blank."""
        check_strings(rows, "context", entry, what)
        for where, options in values(rows, "options", entry, what):
            several = isinstance(options, list) and len(options) > 1
            require(several, f"{where}: {short_repr(options)} is not a list of two or more options")
            for option in options:
                check_text(option, where)

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return the columns of `encode_inputs` and `labels`, the index of the right option of each row."""
        return self.encode_inputs(rows, tokenizer).add_column("labels", self.right_options(rows))

    def encode_inputs(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return input_ids and attention_mask (and token_type_ids), a list per option, truncated to `data.max_length`.

        `length` is the cost of a row in a batch: the tokens of its longest option times its number of options.
        """
        with_types = "token_type_ids" in tokenizer.model_input_names
        cut = {"truncation": True, "max_length": self.config.max_length, "return_token_type_ids": with_types}

        def encode(chunk: dict[str, list[Any]], _: int) -> dict[str, list[Any]]:
            options = _with_endings(chunk)
            contexts = [context for context, of_row in zip(chunk["context"], options, strict=True) for _ in of_row]
            flat = [option for of_row in options for option in of_row]
            tokens = tokenizer(contexts, flat, **cut)
            return {
                name: split_by_counts(column, [len(of_row) for of_row in options]) for name, column in tokens.items()
            }

        return in_chunks(rows, encode, length=lambda options: len(options) * max(map(len, options)))

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
        """Return the collator to [rows, most options, longest option]; rows with fewer get empty, wrong options."""
        pad = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple_of)
        empty = tokenizer("", return_token_type_ids="token_type_ids" in tokenizer.model_input_names)
        empty = {name: ids or [tokenizer.pad_token_id] for name, ids in empty.items()}
        return Collator(_OptionPadding(pad, dict(empty)))

    def right_options(self, rows: Dataset) -> list[int]:
        """Return the index of the right option of every row."""
        return [index for index in map(_parse_index, rows["answer"][:]) if index is not None]

    def options(self, row: Mapping[str, Any]) -> Sequence[str]:
        """Return the options of the row."""
        options: Sequence[str] = row["options"]
        return options

    def prompt(self, row: Mapping[str, Any]) -> str:
        """Return the entry's prompt, else the default, which asks the context as a question."""
        return self.entry.prompt or CHOICE_PROMPT

    def answer(self, respondent: Respondent, encoded: Dataset) -> Outcome:
        """Return the option with the highest logit, and the cross-entropy (nats) per row."""
        logits = _option_logits(respondent, encoded)
        losses = [-of_row.log_softmax(-1)[label] for of_row, label in zip(logits, encoded["labels"], strict=True)]
        answers = chosen_answers(encoded, [int(of_row.argmax()) for of_row in logits])
        return Outcome(replace(answers, scores={"loss": torch.stack(losses).double().numpy()}))

    def predict(self, respondent: Respondent, encoded: Dataset, rows: Dataset) -> Columns:
        """Return `answer`, the most probable option, and its `probability`."""
        return self.picked([of_row.softmax(-1).numpy() for of_row in _option_logits(respondent, encoded)], rows)

    def picked(self, probabilities: Sequence[np.ndarray], rows: Dataset) -> Columns:
        """Return `answer`, the option with the highest probability, and that `probability`."""
        best = [int(of_row.argmax(-1)) for of_row in probabilities]
        texts = rows["names" if "names" in rows.column_names else "options"]
        return {
            "answer": [options[index] for options, index in zip(texts, best, strict=True)],
            "probability": round_all(of_row.max() for of_row in probabilities),
        }


class MultipleChoiceByLikelihood(LikelihoodTask, MultipleChoiceTask):
    """Multiple choice by a language model's probabilities of the options."""


class _OptionPadding:
    """Collator that pads rows to the same number of options, and options to the same length."""

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


def _option_logits(respondent: Respondent, encoded: Dataset) -> list[Tensor]:
    """Return the logits of every row, float32 [options], without those of padding options.

    Raises:
        LightPeftError: there is no row, or logits are not finite.
    """
    counts = [len(options) for options in encoded["input_ids"]]
    of_rows = zip(row_logits(respondent, encoded), counts, strict=True)
    logits = [of_row[:count] for of_row, count in of_rows]
    require_finite([bool(of_row.isfinite().all()) for of_row in logits])
    return logits


def _with_endings(chunk: dict[str, list[Any]]) -> list[list[str]]:
    """Return the options of each row, followed by the row's ending if it has one."""
    endings = chunk.get("ending") or [None] * len(chunk["options"])
    return [
        [f"{option} {ending}" if ending else option for option in options]
        for options, ending in zip(chunk["options"], endings, strict=True)
    ]


def _parse_index(value: Any) -> int | None:
    """Return an index as an integer, also one stored as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return None
    try:
        return int(value)
    except ValueError:
        return None
