"""Causal language modeling on plain texts, or on completions of prompts."""

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
    """Next-token loss on every token of a text, or on completions only if rows have prompts."""

    columns: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ("text", "prompt", "completion")
    targets: ClassVar[tuple[str, ...]] = ("completion",)

    @classmethod
    def sources(cls, named: Mapping[str, str]) -> dict[str, str]:
        """Return the sources of prompt and completion if `named` has them, else of the text.

        Raises:
            LightPeftError: only one of prompt and completion is named.
        """
        prompted = "prompt" in named
        require(prompted == ("completion" in named), "data.columns names only one of prompt and completion; name both")
        sources = {"text": "text", **named}
        return {name: source for name, source in sources.items() if (name == "text") is not prompted}

    @classmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Raise `LightPeftError` unless texts and completions are strings that are not blank; prompts may be blank."""
        cls.check_inputs(rows, entry, what)
        if _has_prompts(rows):
            check_strings(rows, "completion", entry, what)

    @classmethod
    def check_inputs(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Raise `LightPeftError` unless texts are strings that are not blank; prompts may be blank."""
        prompted = "prompt" in rows.column_names
        check_strings(rows, "prompt" if prompted else "text", entry, what, blank=prompted)

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return rows of at most `data.max_length` tokens with a final end token; labels are -100 on the prompt.

        Prompt and completion are tokenized separately, so that generation starts from the same prompt tokens. Nothing
        is inserted between them: a completion that needs a space begins with one. A row that is too long loses the
        beginning of its prompt (the start token stays), then the end of its completion.
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
                require(
                    completion,
                    f"row {start + offset + 1} has no tokens to learn: the tokenizer gives none; drop the row",
                )
                ended = with_end(completion, tokenizer)
                encoded.append(fit(prompt, ended, self.config.max_length, tokenizer.bos_token_id))
            return completion_columns(encoded)

        return in_chunks(rows, encode)

    def encode_inputs(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return encoded prompts, or texts, to continue; those that are too long lose their beginning."""
        column = "prompt" if "prompt" in rows.column_names else "text"

        def encode(chunk: dict[str, list[Any]], start: int) -> dict[str, list[Any]]:
            tokens = [without_end(ids, tokenizer) for ids in tokenizer(chunk[column])["input_ids"]]
            for offset, ids in enumerate(tokens):
                require(
                    ids,
                    f"row {start + offset + 1} has no tokens to continue: its {column} gives none; drop the row",
                )
            return prompt_columns(tokens, self.config.max_length, tokenizer)

        return in_chunks(rows, encode)


def _has_prompts(rows: Dataset) -> bool:
    return {"prompt", "completion"} <= set(rows.column_names)
