"""Answering by likelihood: a causal language model scores every option after the prompt (as lm-evaluation-harness).

Training raises the probability of the right option; nothing but the language-modeling head is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from scipy.special import softmax
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from lightpeft.app.tasks.answers import Columns, Metric, Outcome, require_finite
from lightpeft.app.tasks.kinds.completions import completion_columns, fit, without_end
from lightpeft.app.tasks.kinds.options import OptionsTask, chosen_answers, split_by_counts
from lightpeft.app.tasks.metrics import accuracy, rename_values
from lightpeft.app.tasks.respondent import Respondent, token_sums
from lightpeft.app.tasks.tokens import Collator, in_chunks
from lightpeft.config import LikelihoodRule
from lightpeft.errors import LightPeftError, require
from lightpeft.models.batches import IGNORED
from lightpeft.models.task_heads import CAUSAL_LM, TaskHead

ACCURACIES: dict[LikelihoodRule, str] = {"sum": "accuracy", "byte": "accuracy_norm"}
"""Rule that chooses an option -> name of its accuracy."""


@dataclass(frozen=True)
class Scored:
    """Texts of one row that a causal language model scores."""

    prompts: list[str]
    """One per option; equal for all options unless the option is inside the text."""
    completions: list[str]
    """Text after each prompt, whose tokens are scored; one per option."""


class LikelihoodTask(OptionsTask):
    """Mixin: a causal language model scores the options of the kind that follows it among the base classes."""

    head: ClassVar[TaskHead] = CAUSAL_LM

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return prompt and right option as at most `data.max_length` tokens; labels are -100 on the prompt.

        No end token is learned, since none is scored. A row that is too long loses the beginning of its
        prompt (the start token stays).
        """
        right = self.right_options(rows)

        def encode(chunk: dict[str, list[Any]], start: int) -> dict[str, list[Any]]:
            scored = list(self.scored(chunk))
            chosen = right[start : start + len(scored)]
            prompts = [row.prompts[index] for row, index in zip(scored, chosen, strict=True)]
            completions = [row.completions[index] for row, index in zip(scored, chosen, strict=True)]
            return completion_columns(encode_pairs(prompts, completions, tokenizer, self.config.max_length))

        return in_chunks(rows, encode)

    def encode_test(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return the columns of `encode_inputs` and `labels`, the number of the right option of each row."""
        encoded = self.encode_inputs(rows, tokenizer)
        return self.carry(rows, encoded.add_column("labels", self.right_options(rows)))

    def encode_inputs(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return one list per row over its options: input_ids, start (first token of the option), and bytes."""

        def encode(chunk: dict[str, list[Any]], _: int) -> dict[str, list[Any]]:
            scored = list(self.scored(chunk))
            counts = [len(row.completions) for row in scored]
            prompts = [prompt for row in scored for prompt in row.prompts]
            completions = [completion for row in scored for completion in row.completions]
            asked = encode_pairs(prompts, completions, tokenizer, self.config.max_length)
            sizes = [len(completion.strip().encode()) for completion in completions]
            return {
                "input_ids": split_by_counts([prompt + completion for prompt, completion in asked], counts),
                "start": split_by_counts([len(prompt) for prompt, _ in asked], counts),
                "bytes": split_by_counts(sizes, counts),
            }

        return in_chunks(rows, encode, length=lambda options: sum(map(len, options)))

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
        """Return the collator: pads to the longest sequence, or the next multiple; labels of padding are -100.

        Padding is always on the right: no token attends to later ones, so the scores are those of a single sequence,
        also for models that count positions from the first column (GPT-2).
        """
        right = copy.copy(tokenizer)
        right.padding_side = "right"
        return Collator(DataCollatorForSeq2Seq(right, pad_to_multiple_of=multiple_of, label_pad_token_id=IGNORED))

    def answer(self, respondent: Respondent, encoded: Dataset) -> Outcome:
        """Return the option that the rule `data.likelihood` chooses, and per row the accuracy of each rule."""
        labels, found = encoded["labels"][:], likelihoods(respondent, encoded)
        picked = {
            rule: chosen_answers(encoded, [int(of_row.argmax(-1)) for of_row in scores])
            for rule, scores in found.scores.items()
        }
        right = [numbers[label] for numbers, label in zip(found.sequences, labels, strict=True)]
        accuracies = {name: accuracy.scores(picked[rule])["accuracy"] for rule, name in ACCURACIES.items()}
        answers = replace(picked[self.config.likelihood], scores=accuracies)
        if self.labels:
            probabilities = softmax(np.stack(found.scores[self.config.likelihood]), axis=-1)
            answers = replace(answers, probabilities=probabilities.astype(np.float32))
        return Outcome(answers, {"loss": float(found.losses[right].sum()) / float(found.tokens[right].sum())})

    def predict(self, respondent: Respondent, encoded: Dataset, rows: Dataset) -> Columns:
        """Return the prediction columns of the kind, with probabilities by a softmax over the options' scores."""
        scores = likelihoods(respondent, encoded).scores[self.config.likelihood]
        return self.picked([softmax(of_row) for of_row in scores], rows)

    def scored(self, columns: dict[str, list[Any]]) -> Iterator[Scored]:
        """Yield prompts and completions of each row; `columns` holds the rows."""
        names = list(columns)
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(names, values, strict=True))
            try:
                prompt = row.get("prompt") or self.prompt(row).format_map(row)
            except KeyError as error:
                lacking = f"the prompt of task {self.config.task} names the column {error}, which the rows do not have"
                raise LightPeftError(f"{lacking}; name it in columns, or leave it out of the prompt") from error
            options, ending = self.options(row), row.get("ending")
            if ending:
                yield Scored([f"{prompt} {option}" for option in options], [f" {ending}"] * len(options))
            else:
                yield Scored([prompt] * len(options), [f" {option}" for option in options])

    @property
    def main_metric(self) -> str:
        """Name of the main value; an accuracy has the name of the rule `data.likelihood`."""
        return self._names.get(super().main_metric, super().main_metric)

    @property
    def measures(self) -> tuple[Metric, ...]:
        """Metrics of the answers that the rule `data.likelihood` chooses, the main metric first."""
        return tuple(rename_values(measure, self._names) for measure in super().measures)

    @property
    def _names(self) -> dict[str, str]:
        return {"accuracy": ACCURACIES[self.config.likelihood]}


def encode_pairs(
    prompts: list[str], completions: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """Return (prompt, completion) token pairs, tokenized together and split where the prompt alone ends.

    The completion thus has its tokens of running text, also if the tokenizer treats the beginning of a text specially.
    Pairs are truncated to `max_length` tokens on the left of the prompt.
    """
    alone = [without_end(ids, tokenizer) for ids in tokenizer(prompts)["input_ids"]]
    together = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    whole = [without_end(ids, tokenizer) for ids in tokenizer(together)["input_ids"]]
    pairs = []
    for text, prompt, ids in zip(together, alone, whole, strict=True):
        require(
            0 < len(prompt) < len(ids),
            f"the answer has no token of its own to score in {text[-60:]!r}; change the prompt or the option",
        )
        pairs.append(fit(ids[: len(prompt)], ids[len(prompt) :], max_length, tokenizer.bos_token_id))
    return pairs


@dataclass(frozen=True)
class Likelihoods:
    """Log-likelihoods of the options of rows under a model."""

    scores: dict[LikelihoodRule, list[np.ndarray]]
    """Rule -> one array of scores [options] per row; the highest score is the answer."""
    sequences: list[list[int]]
    """Index into `losses` and `tokens` of every option of every row."""
    losses: np.ndarray
    """Summed cross-entropy of the scored tokens, in nats: float64 [sequences]."""
    tokens: np.ndarray
    """Number of scored tokens: float64 [sequences]."""


def likelihoods(respondent: Respondent, encoded: Dataset) -> Likelihoods:
    """Score the options of every row; equal sequences are scored once, and prompts that options share are read once.

    Args:
        encoded: the result of `LikelihoodTask.encode_test` or `encode_inputs`.

    Raises:
        LightPeftError: there is no row, or a likelihood is NaN or infinite.
    """
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    asked = [
        [numbers.setdefault((start, tuple(tokens)), len(numbers)) for tokens, start in zip(*options, strict=True)]
        for options in zip(encoded["input_ids"], encoded["start"], strict=True)
    ]
    prompts: dict[tuple[int, ...], int] = {}
    shared = [prompts.setdefault(ids[:start], len(prompts)) for start, ids in numbers]
    rows = Dataset.from_dict(
        {
            **completion_columns((list(ids[:start]), list(ids[start:])) for start, ids in numbers),
            "length": [len(ids) for _, ids in numbers],
            **({"prompt": shared} if len(prompts) < len(numbers) else {}),
        }
    )
    losses, _, tokens = token_sums(respondent, rows).T
    require_finite([bool(np.isfinite(losses[options]).all()) for options in asked])
    sums = [-losses[options] for options in asked]
    by_byte = [of_row / np.asarray(sizes) for of_row, sizes in zip(sums, encoded["bytes"][:], strict=True)]
    return Likelihoods({"sum": sums, "byte": by_byte}, asked, losses, tokens)
