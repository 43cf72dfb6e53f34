"""Helpers of kinds that a causal language model completes: prompts and completions as tokens, and their batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from lightpeft.app.tasks.answers import Columns, Outcome, answers_of, require_finite
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.respondent import Respondent, token_sums
from lightpeft.app.tasks.tokens import Collator
from lightpeft.errors import require
from lightpeft.models.batches import IGNORED
from lightpeft.models.task_heads import CAUSAL_LM, TaskHead


class CompletionTask(Task):
    """Base of tasks with a language-modeling head: the model generates the continuation of new rows."""

    head: ClassVar[TaskHead] = CAUSAL_LM
    default_metrics: ClassVar[tuple[str, ...]] = ("language_modeling",)

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
        """Return the collator: pads to the longest row, or the next multiple; labels of padding are -100."""
        pad = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple_of, label_pad_token_id=IGNORED)
        return Collator(pad, tokenizer)

    def answer(self, respondent: Respondent, encoded: Dataset) -> Outcome:
        """Return per row the summed cross-entropy (nats), correct tokens, and number of labeled tokens."""
        sums = token_sums(respondent, encoded)
        require_finite(np.isfinite(sums[:, 0]))
        require(
            sums[:, 2].sum() > 0,
            "these rows have no token to predict; raise data.max_length or give longer texts",
        )
        predictions = [tuple(of_row) for of_row in sums.tolist()]
        answers = answers_of(encoded, predictions, [None] * len(encoded))
        return Outcome(answers, {"tokens": float(sums[:, 2].sum())})

    def predict(self, respondent: Respondent, encoded: Dataset, rows: Dataset) -> Columns:
        """Return `answer`, the generated text of at most `data.answer_tokens` tokens."""
        return {"answer": respondent.texts(encoded, self.config.answer_tokens)}


def completion_columns(pairs: Iterable[tuple[list[int], list[int]]]) -> dict[str, list[list[int]]]:
    """Return the encoded columns of (prompt, completion) token pairs; labels are -100 on the prompt."""
    pairs = list(pairs)
    return {
        "input_ids": [prompt + completion for prompt, completion in pairs],
        "attention_mask": [[1] * (len(prompt) + len(completion)) for prompt, completion in pairs],
        "labels": [[IGNORED] * len(prompt) + completion for prompt, completion in pairs],
    }


def prompt_columns(
    prompts: list[list[int]], max_length: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[list[int]]]:
    """Return the encoded columns of prompts, truncated on the left to `max_length` tokens."""
    cut = [fit(prompt, [], max_length, tokenizer.bos_token_id)[0] for prompt in prompts]
    return {"input_ids": cut, "attention_mask": [[1] * len(prompt) for prompt in cut]}


def fit(prompt: list[int], completion: list[int], max_length: int, start: int | None) -> tuple[list[int], list[int]]:
    """Truncate the prompt on the left, then the completion on the right; one prompt token stays to predict from."""
    completion = completion[: max_length - min(len(prompt), 1)]
    room = max_length - len(completion)
    if len(prompt) <= room:
        return prompt, completion
    if prompt[0] == start:
        return [prompt[0], *prompt[len(prompt) - room + 1 :]], completion
    return prompt[len(prompt) - room :], completion


def with_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens with one end token at the end."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1] == end else [*ids, end]


def without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens without a final end token, which some tokenizers add, since a prompt continues.

    A single token stays: it may be the start token, too.
    """
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
