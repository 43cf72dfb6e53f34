"""Causal language modelling on plain texts, or on completions of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lightpeft.app.tasks.kinds.completions import (
    CompletionTask,
    completion_columns,
    fit,
    prompt_columns,
    with_end,
    without_end,
)
from lightpeft.app.tasks.rows.columns import check_strings
from lightpeft.app.tasks.tokens import in_chunks
from lightpeft.config import TaskEntry
from lightpeft.errors import require


class CausalLMTask(CompletionTask):
    """Next-token loss on every token of a text, or on the completion only where prompts are given."""

    columns: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ("text", "prompt", "completion")
    targets: ClassVar[tuple[str, ...]] = ("completion",)

    @classmethod
    def sources(cls, named: Mapping[str, str]) -> dict[str, str]:
        """Prompt and completion where they are named, else the text.

        Raises:
            LightPeftError: one of the two is named alone.
        """
        prompted = "prompt" in named
        require(prompted == ("completion" in named), "columns of a prompt and of its completion go together; name both")
        sources = {"text": "text", **named}
        return {name: source for name, source in sources.items() if (name == "text") is not prompted}

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

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Rows of at most `data.max_length` tokens that end with the end token unless cut; labels -100 on the prompt.

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
                ended = with_end(completion, tokenizer)
                encoded.append(fit(prompt, ended, self.config.max_length, tokenizer.bos_token_id))
            return completion_columns(encoded)

        return in_chunks(rows, encode)

    def encode_inputs(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Prompts, or texts, to be gone on with; those that are too long lose their beginning."""
        column = "prompt" if "prompt" in rows.column_names else "text"

        def encode(chunk: dict[str, list[Any]], start: int) -> dict[str, list[Any]]:
            tokens = [without_end(ids, tokenizer) for ids in tokenizer(chunk[column])["input_ids"]]
            for offset, ids in enumerate(tokens):
                require(ids, f"row {start + offset + 1} has no token to go on from: its {column} gives none")
            return prompt_columns(tokens, self.config.max_length, tokenizer)

        return in_chunks(rows, encode)


def _has_prompts(rows: Dataset) -> bool:
    return {"prompt", "completion"} <= set(rows.column_names)
