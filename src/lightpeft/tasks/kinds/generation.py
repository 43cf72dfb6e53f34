"""Short answers that a causal language model writes itself."""

from __future__ import annotations

from typing import Any, ClassVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lightpeft.config import Head, TaskEntry
from lightpeft.console.bars import Progress, bar
from lightpeft.errors import require
from lightpeft.tasks.kinds.base import Task, check_text, values
from lightpeft.tasks.kinds.causal import completion_collator, fit, prompt_columns, with_end, without_end
from lightpeft.tasks.tokens import IGNORED, Collator, in_chunks

PROMPT = "Question: {question}\nAnswer:"
"""Where the entry has none."""


class GenerationTask(Task):
    """Train on the prompt and the first right answer; answer by generating one line, which any right answer may match.

    Rows have `question` and `answers`, a list of texts or one text.
    """

    head: ClassVar[Head] = "causal-lm"
    answering: ClassVar[str] = "generation"
    columns: ClassVar[tuple[str, ...]] = ("question", "answers")
    answers: ClassVar[tuple[str, ...]] = ("answers",)
    default_metrics: ClassVar[tuple[str, ...]] = ("text_match",)

    @classmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Questions are strings that are not blank, and have one answer at least that is none either."""
        cls.check_inputs(rows, entry, what)
        for where, value in values(rows, "answers", entry, what):
            require(value not in (None, []), f"{where}: there is no answer; fill it in or drop the row")
            for text in _listed(value):
                check_text(text, where)

    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress = bar
    ) -> Dataset:
        """Prompt, first answer and end token; labels are -100 on the prompt.

        Both are tokenised apart, since generation starts from the prompt's own tokens. Of `max_length` tokens the
        answer gets `data.answer_tokens`, and a longer prompt loses its beginning (the start token stays).
        """

        def encode(chunk: dict[str, list[Any]], _: int) -> dict[str, list[Any]]:
            first = [f" {_listed(value)[0].strip()}" for value in chunk["answers"]]
            answers = tokenizer(first, add_special_tokens=False)["input_ids"]
            answers = [with_end(ids, tokenizer)[: self.config.answer_tokens] for ids in answers]
            prompts = self._prompts(chunk["question"], tokenizer, max_length)
            pairs = list(zip(prompts, answers, strict=True))
            return {
                "input_ids": [prompt + answer for prompt, answer in pairs],
                "attention_mask": [[1] * (len(prompt) + len(answer)) for prompt, answer in pairs],
                "labels": [[IGNORED] * len(prompt) + answer for prompt, answer in pairs],
            }

        return in_chunks(rows, encode, progress)

    def encode_test(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress = bar
    ) -> Dataset:
        """As `encode_inputs`, with `right`, the texts that are right."""
        right = [_listed(value) for value in rows["answers"]]
        return self.encode_inputs(rows, tokenizer, max_length, progress).add_column("right", right)

    def encode_inputs(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress = bar
    ) -> Dataset:
        """The prompts."""

        def encode(chunk: dict[str, list[Any]], _: int) -> dict[str, list[Any]]:
            prompts = self._prompts(chunk["question"], tokenizer, max_length)
            return prompt_columns(prompts, max_length, tokenizer)

        return in_chunks(rows, encode, progress)

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
        """Batches padded to their longest row (or the next multiple); labels of padding are -100."""
        return completion_collator(tokenizer, multiple_of)

    def _prompts(self, questions: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
        room = max_length - self.config.answer_tokens
        require(
            room > 1,
            f"data.answer_tokens is {self.config.answer_tokens}, which leaves no room for the question in "
            f"data.max_length {max_length}",
        )
        template = self.entry.prompt or PROMPT
        texts = [template.format(question=question.strip()) for question in questions]
        prompts = [without_end(ids, tokenizer) for ids in tokenizer(texts)["input_ids"]]
        return [fit(prompt, [], room, tokenizer.bos_token_id)[0] for prompt in prompts]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
