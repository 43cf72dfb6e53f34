"""Answering by likelihood: a causal language model scores every option behind the prompt (as lm-evaluation-harness).

Training raises the probability of the right option; nothing but the language-modelling head is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from lightpeft.config import Head, LikelihoodRule, TaskEntry, TaskKind
from lightpeft.console.bars import Progress, bar
from lightpeft.errors import require
from lightpeft.tasks.answers import Metric
from lightpeft.tasks.kinds.base import Task
from lightpeft.tasks.kinds.causal import fit, without_end
from lightpeft.tasks.kinds.classification import ClassificationTask
from lightpeft.tasks.kinds.multiple_choice import MultipleChoiceTask, answer_indices, nested
from lightpeft.tasks.metrics import renamed
from lightpeft.tasks.tokens import IGNORED, Collator, in_chunks

UNCONDITIONAL = "Answer:"
"""The prompt without a question, which says how probable an option is anyway (Brown et al. 2020, section 2.4)."""
ACCURACIES: dict[LikelihoodRule, str] = {
    "sum": "accuracy",
    "token": "accuracy_token",
    "byte": "accuracy_norm",
    "unconditional": "accuracy_unconditional",
}
"""Rule that picks an option -> what the accuracy of its picks is called."""
PROMPTS: dict[TaskKind, str] = {"classification": "{text}\nAnswer:", "multiple-choice": "Question: {context}\nAnswer:"}
"""Prompt by kind, where the entry has none."""
PAIR_PROMPT = "{text}\n{text_pair}\nAnswer:"
"""The same for pairs of texts."""


@dataclass(frozen=True)
class Choice:
    """One row as a causal language model reads it."""

    prompts: list[str]
    """One an option; the same for all unless the option stands inside the text."""
    completions: list[str]
    """What is scored behind each prompt."""


class LikelihoodTask(Task):
    """A classification or multiple-choice task whose options are scored by a causal language model."""

    head: ClassVar[Head] = "causal-lm"
    answering: ClassVar[str] = "likelihood"
    columns: ClassVar[tuple[str, ...]] = ()
    carried: ClassVar[tuple[str, ...]] = ("group", "names", "right")
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    @classmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """As the kind of rows wants it."""
        SCORABLE[entry.kind].check(rows, entry, what)

    @classmethod
    def check_inputs(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """As the kind of rows wants it."""
        SCORABLE[entry.kind].check_inputs(rows, entry, what)

    @classmethod
    def label_set(cls, rows: Dataset, entry: TaskEntry) -> list[str]:
        """As the kind of rows has it."""
        return SCORABLE[entry.kind].label_set(rows, entry)

    @classmethod
    def check_split(cls, train: Dataset, test: Dataset, labels: list[str], entry: TaskEntry) -> None:
        """As the kind of rows wants it."""
        SCORABLE[entry.kind].check_split(train, test, labels, entry)

    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress = bar
    ) -> Dataset:
        """Prompt and right option, of at most `max_length` tokens; labels are -100 on the prompt.

        No end token is learned: what is trained is what is scored. A row that is too long loses the beginning of its
        prompt (the start token stays).
        """
        right = self.right_options(rows)

        def encode(chunk: dict[str, list[Any]], start: int) -> dict[str, list[Any]]:
            choices = list(self.choices(chunk))
            chosen = right[start : start + len(choices)]
            prompts = [choice.prompts[index] for choice, index in zip(choices, chosen, strict=True)]
            completions = [choice.completions[index] for choice, index in zip(choices, chosen, strict=True)]
            pairs = encode_pairs(prompts, completions, tokenizer, max_length)
            return {
                "input_ids": [prompt + completion for prompt, completion in pairs],
                "attention_mask": [[1] * (len(prompt) + len(completion)) for prompt, completion in pairs],
                "labels": [[IGNORED] * len(prompt) + completion for prompt, completion in pairs],
            }

        return in_chunks(rows, encode, progress)

    def encode_test(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress = bar
    ) -> Dataset:
        """As `encode_inputs`, with `labels` as the numbers of the right options."""
        encoded = self.encode_inputs(rows, tokenizer, max_length, progress)
        return self.carry(rows, encoded.add_column("labels", self.right_options(rows)))

    def encode_inputs(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress = bar
    ) -> Dataset:
        """A row's options as lists: input_ids, start (of the option in them), the same unconditional_, and bytes."""

        def encode(chunk: dict[str, list[Any]], _: int) -> dict[str, list[Any]]:
            choices = list(self.choices(chunk))
            counts = [len(choice.completions) for choice in choices]
            prompts = [prompt for choice in choices for prompt in choice.prompts]
            completions = [completion for choice in choices for completion in choice.completions]
            asked = encode_pairs(prompts, completions, tokenizer, max_length)
            plain = encode_pairs([UNCONDITIONAL] * len(prompts), completions, tokenizer, max_length)
            sizes = [len(completion.strip().encode()) for completion in completions]
            return {
                "input_ids": nested([prompt + completion for prompt, completion in asked], counts),
                "start": nested([len(prompt) for prompt, _ in asked], counts),
                "unconditional_ids": nested([prompt + completion for prompt, completion in plain], counts),
                "unconditional_start": nested([len(prompt) for prompt, _ in plain], counts),
                "bytes": nested(sizes, counts),
            }

        return in_chunks(rows, encode, progress, length=lambda options: sum(map(len, options)))

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
        """Batches of sequences, padded to their longest (or the next multiple); labels of padding are -100.

        Padding is on the right, whichever side the tokenizer pads: no token sees what follows it, so scores are those
        of a sequence alone, also of models that count positions from the first column (GPT-2).
        """
        right = copy.copy(tokenizer)
        right.padding_side = "right"
        return Collator(DataCollatorForSeq2Seq(right, pad_to_multiple_of=multiple_of, label_pad_token_id=IGNORED))

    def choices(self, columns: dict[str, list[Any]]) -> Iterator[Choice]:
        """Prompts and options of rows, given as columns."""
        kind, names = self.entry.kind, list(columns)
        fixed = (self.entry.words or self.labels) if kind == "classification" else None
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(names, values, strict=True))
            prompt = row.get("prompt") or self._template(row).format_map(row)
            options, ending = fixed or row["options"], row.get("ending")
            if ending:
                yield Choice([f"{prompt} {option}" for option in options], [f" {ending}"] * len(options))
            else:
                yield Choice([prompt] * len(options), [f" {option}" for option in options])

    def _template(self, row: dict[str, Any]) -> str:
        pair = self.entry.kind == "classification" and row.get("text_pair") is not None
        return self.entry.prompt or (PAIR_PROMPT if pair else PROMPTS[self.entry.kind])

    def right_options(self, rows: Dataset) -> list[int]:
        """Every row's right option."""
        if self.entry.kind == "multiple-choice":
            return answer_indices(rows)
        return ClassificationTask(self.config, rows, rows, self.labels, self.entry).class_numbers(rows)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What the kind of rows measures."""
        return tuple(self.entry.metrics) or SCORABLE[self.entry.kind].default_metrics

    @property
    def main_metric(self) -> str:
        """The main value; an accuracy goes by the rule that picks the options."""
        return self._names.get(super().main_metric, super().main_metric)

    @property
    def measures(self) -> tuple[Metric, ...]:
        """What is measured of the answers that `data.likelihood` picks."""
        return tuple(renamed(measure, self._names) for measure in super().measures)

    @property
    def _names(self) -> dict[str, str]:
        return {"accuracy": ACCURACIES[self.config.likelihood]}


SCORABLE: dict[TaskKind, type[Task]] = {"classification": ClassificationTask, "multiple-choice": MultipleChoiceTask}
"""Kinds of rows that likelihood can answer."""


def encode_pairs(
    prompts: list[str], completions: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """Tokens of prompts and of what follows, tokenised together and cut apart where the prompt alone ends.

    So a completion gets the tokens that it has in running text, also where a tokenizer treats the beginning of a text
    in a way of its own. Together they are cut to `max_length` from the left of the prompt.
    """
    alone = [without_end(ids, tokenizer) for ids in tokenizer(prompts)["input_ids"]]
    together = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    whole = [without_end(ids, tokenizer) for ids in tokenizer(together)["input_ids"]]
    pairs = []
    for text, prompt, ids in zip(together, alone, whole, strict=True):
        require(0 < len(prompt) < len(ids), f"no token of the answer is left to score in {text[-60:]!r}")
        pairs.append(fit(ids[: len(prompt)], ids[len(prompt) :], max_length, tokenizer.bos_token_id))
    return pairs


@dataclass(frozen=True)
class Sequences:
    """The sequences that score the options of encoded rows; equal ones are there once."""

    rows: Dataset
    """input_ids, attention_mask, labels (-100 on the prompt) and length."""
    asked: list[list[int]]
    """Sequence of every row's every option behind its prompt."""
    unconditional: list[list[int]]
    """The same behind the prompt without a question."""


def option_sequences(encoded: Dataset) -> Sequences:
    """What is to be scored of rows that `LikelihoodTask.encode_test` gave."""
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}

    def place(ids: str, starts: str) -> list[list[int]]:
        return [
            [numbers.setdefault((start, tuple(tokens)), len(numbers)) for tokens, start in zip(*options, strict=True)]
            for options in zip(encoded[ids], encoded[starts], strict=True)
        ]

    asked, unconditional = place("input_ids", "start"), place("unconditional_ids", "unconditional_start")
    rows = Dataset.from_dict(
        {
            "input_ids": [list(ids) for _, ids in numbers],
            "attention_mask": [[1] * len(ids) for _, ids in numbers],
            "labels": [[IGNORED] * start + list(ids[start:]) for start, ids in numbers],
            "length": [len(ids) for _, ids in numbers],
        }
    )
    return Sequences(rows, asked, unconditional)


def option_scores(
    sequences: Sequences, log_p: np.ndarray, tokens: np.ndarray, sizes: list[list[int]]
) -> dict[LikelihoodRule, list[np.ndarray]]:
    """Every rule's scores of every row's options; the highest is the answer.

    Args:
        log_p: [sequences], sums of log-probabilities of the scored tokens.
        tokens: [sequences], their numbers.
        sizes: bytes of every row's options.
    """
    sums = [log_p[numbers] for numbers in sequences.asked]
    return {
        "sum": sums,
        "token": [log_p[numbers] / tokens[numbers] for numbers in sequences.asked],
        "byte": [of_row / np.asarray(size) for of_row, size in zip(sums, sizes, strict=True)],
        "unconditional": [
            of_row - log_p[numbers] for of_row, numbers in zip(sums, sequences.unconditional, strict=True)
        ],
    }
