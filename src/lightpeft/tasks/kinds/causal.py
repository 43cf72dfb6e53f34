"""Causal language modelling on plain texts, or on completions of prompts."""

from __future__ import annotations

from typing import Any, ClassVar

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from lightpeft.config import Head, TaskEntry
from lightpeft.console.bars import Progress, bar
from lightpeft.errors import require
from lightpeft.tasks.kinds.base import Task, check_strings
from lightpeft.tasks.tokens import IGNORED, Collator, in_chunks


class CausalLMTask(Task):
    """Next-token loss on every token of a text, or on the completion only where prompts are given."""

    head: ClassVar[Head] = "causal-lm"
    answering: ClassVar[str] = "causal-lm"
    columns: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ("text", "prompt", "completion")
    answers: ClassVar[tuple[str, ...]] = ("completion",)
    default_metrics: ClassVar[tuple[str, ...]] = ("language_modelling",)

    @classmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Texts and completions are strings that are not blank; a prompt may be blank."""
        cls.check_inputs(rows, entry, what)
        if _has_prompts(rows):
            check_strings(rows, "completion", entry, what)

    @classmethod
    def check_inputs(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Texts are strings that are not blank; a prompt may be blank."""
        prompted = "prompt" in rows.column_names
        check_strings(rows, "prompt" if prompted else "text", entry, what, blank=prompted)

    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress = bar
    ) -> Dataset:
        """Rows of at most `max_length` tokens that end with the end token unless cut; labels -100 on the prompt.

        Prompt and completion are tokenised apart, so that the prompt's tokens are those that generation starts
        from; nothing is put between them (a completion that needs a space begins with one). A row that is too long
        loses the beginning of its prompt (the start token stays), then the end of its completion.
        """
        prompted = _has_prompts(rows)

        def encode(chunk: dict[str, list[Any]], start: int) -> dict[str, list[Any]]:
            if not prompted:
                prompts: list[list[int]] = [[] for _ in chunk["text"]]
                completions = tokenizer(chunk["text"])["input_ids"]
            else:
                prompts = [without_end(ids, tokenizer) for ids in tokenizer(chunk["prompt"])["input_ids"]]
                completions = tokenizer(chunk["completion"], add_special_tokens=False)["input_ids"]
            encoded = []
            for offset, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
                require(completion, f"row {start + offset + 1} has no token to learn from: its text gives none")
                encoded.append(fit(prompt, with_end(completion, tokenizer), max_length, tokenizer.bos_token_id))
            return {
                "input_ids": [prompt + completion for prompt, completion in encoded],
                "attention_mask": [[1] * (len(prompt) + len(completion)) for prompt, completion in encoded],
                "labels": [[IGNORED] * len(prompt) + completion for prompt, completion in encoded],
            }

        return in_chunks(rows, encode, progress)

    def encode_inputs(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress = bar
    ) -> Dataset:
        """Prompts, or texts, to be gone on with; those that are too long lose their beginning."""
        column = "prompt" if "prompt" in rows.column_names else "text"

        def encode(chunk: dict[str, list[Any]], start: int) -> dict[str, list[Any]]:
            tokens = [without_end(ids, tokenizer) for ids in tokenizer(chunk[column])["input_ids"]]
            for offset, ids in enumerate(tokens):
                require(ids, f"row {start + offset + 1} has no token to go on from: its {column} gives none")
            return prompt_columns(tokens, max_length, tokenizer)

        return in_chunks(rows, encode, progress)

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
        """Batches padded to their longest row (or the next multiple); labels of padding are -100."""
        return completion_collator(tokenizer, multiple_of)


def completion_collator(tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
    """Batches padded to their longest row (or the next multiple); labels of padding are -100."""
    pad = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple_of, label_pad_token_id=IGNORED)
    return Collator(pad, tokenizer)


def _has_prompts(rows: Dataset) -> bool:
    return {"prompt", "completion"} <= set(rows.column_names)


def prompt_columns(
    prompts: list[list[int]], max_length: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[list[int]]]:
    """Encoded columns of prompts, cut from the left to `max_length` tokens."""
    cut = [fit(prompt, [], max_length, tokenizer.bos_token_id)[0] for prompt in prompts]
    return {"input_ids": cut, "attention_mask": [[1] * len(prompt) for prompt in cut]}


def fit(prompt: list[int], completion: list[int], max_length: int, start: int | None) -> tuple[list[int], list[int]]:
    """Cut the prompt from the left and then the completion from the right; one prompt token stays to predict from."""
    completion = completion[: max_length - min(len(prompt), 1)]
    room = max_length - len(completion)
    if len(prompt) <= room:
        return prompt, completion
    if prompt[0] == start:
        return [prompt[0], *prompt[len(prompt) - room + 1 :]], completion
    return prompt[len(prompt) - room :], completion


def with_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens with the end token behind them, once."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1] == end else [*ids, end]


def without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Some tokenizers close every text; a prompt goes on. A lone token stays: it may be the start token too."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
