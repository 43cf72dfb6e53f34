"""Causal language modelling on plain texts, or on completions of prompts."""

from __future__ import annotations

from typing import Any, ClassVar

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from lightpeft.config import DataConfig, TaskKind
from lightpeft.errors import require
from lightpeft.tasks.base import Task, check_strings
from lightpeft.tasks.progress import Progress, bar
from lightpeft.tasks.tokens import IGNORED, Collator, in_chunks


class CausalLMTask(Task):
    """Next-token loss on every token of a text, or on the completion only where prompts are given."""

    head: ClassVar[TaskKind] = "causal-lm"

    @classmethod
    def check(cls, rows: Dataset, config: DataConfig, what: str) -> None:
        """Texts and completions are strings that are not blank; a prompt may be blank."""
        if config.prompt is None or config.completion is None:
            check_strings(rows, config.text, "data.text", what)
            return
        check_strings(rows, config.prompt, "data.prompt", what, blank=True)
        check_strings(rows, config.completion, "data.completion", what)

    @classmethod
    def label_set(cls, rows: Dataset, config: DataConfig) -> list[str]:
        """No classes."""
        return []

    @classmethod
    def check_split(cls, train: Dataset, test: Dataset, labels: list[str], config: DataConfig) -> None:
        """Any two sets of texts fit together."""

    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress = bar
    ) -> Dataset:
        """Rows of at most `max_length` tokens that end with the end token unless cut; labels -100 on the prompt.

        Prompt and completion are tokenised apart, so that the prompt's tokens are those that generation starts
        from; nothing is put between them (a completion that needs a space begins with one). A row that is too long
        loses the beginning of its prompt (the start token stays), then the end of its completion.
        """
        config = self.config

        def encode(chunk: dict[str, list[Any]], start: int) -> dict[str, list[Any]]:
            if config.prompt is None or config.completion is None:
                prompts: list[list[int]] = [[] for _ in chunk[config.text]]
                completions = tokenizer(chunk[config.text])["input_ids"]
            else:
                prompts = [_without_end(ids, tokenizer) for ids in tokenizer(chunk[config.prompt])["input_ids"]]
                completions = tokenizer(chunk[config.completion], add_special_tokens=False)["input_ids"]
            encoded = []
            for offset, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
                require(completion, f"row {start + offset + 1} has no token to learn from: its text gives none")
                encoded.append(_fit(prompt, _with_end(completion, tokenizer), max_length, tokenizer.bos_token_id))
            return {
                "input_ids": [prompt + completion for prompt, completion in encoded],
                "attention_mask": [[1] * (len(prompt) + len(completion)) for prompt, completion in encoded],
                "labels": [[IGNORED] * len(prompt) + completion for prompt, completion in encoded],
            }

        return in_chunks(rows, encode, progress)

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
        """Batches padded to their longest row (or the next multiple); labels of padding are -100."""
        return Collator(DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple_of, label_pad_token_id=IGNORED))


def _fit(prompt: list[int], completion: list[int], max_length: int, start: int | None) -> tuple[list[int], list[int]]:
    """Cut the prompt from the left and then the completion from the right; one prompt token stays to predict from."""
    completion = completion[: max_length - min(len(prompt), 1)]
    room = max_length - len(completion)
    if len(prompt) <= room:
        return prompt, completion
    if prompt[0] == start:
        return [prompt[0], *prompt[len(prompt) - room + 1 :]], completion
    return prompt[len(prompt) - room :], completion


def _with_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1] == end else [*ids, end]


def _without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Some tokenizers close every text; a prompt goes on. A lone token stays: it may be the start token too."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
