"""Questions with short answers that a causal language model generates."""

from __future__ import annotations

from typing import Any, ClassVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lightpeft.app.tasks.answers import Columns, Outcome, answers_of
from lightpeft.app.tasks.kinds.completions import (
    CompletionTask,
    completion_columns,
    fit,
    prompt_columns,
    with_end,
    without_end,
)
from lightpeft.app.tasks.respondent import Respondent
from lightpeft.app.tasks.rows.columns import check_text, values
from lightpeft.app.tasks.tokens import in_chunks
from lightpeft.config import TaskEntry
from lightpeft.errors import require

QUESTION_PROMPT = "Question: {question}\nAnswer:"
"""Default prompt."""


class GenerationTask(CompletionTask):
    """Train on the prompt and the first right answer; answer with one generated line.

    Rows have `question` and `answers`, a list of texts or one text.
    """

    columns: ClassVar[tuple[str, ...]] = ("question", "answers")
    targets: ClassVar[tuple[str, ...]] = ("answers",)
    writes: ClassVar[bool] = True
    default_metrics: ClassVar[tuple[str, ...]] = ("text_match",)

    @classmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Raise `LightPeftError` unless questions are not blank and have at least one answer that is not blank."""
        cls.check_inputs(rows, entry, what)
        for where, value in values(rows, "answers", entry, what):
            require(value not in (None, []), f"{where}: the answer is missing; fill it in or drop the row")
            for text in _as_list(value):
                check_text(text, where)

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return prompt, first answer and end token as tokens; labels are -100 on the prompt.

        Prompt and answer are tokenized separately, since generation starts from the prompt's tokens. The answer gets
        `data.answer_tokens` of `data.max_length` tokens; a longer prompt loses its beginning (the start token stays).
        """

        def encode(chunk: dict[str, list[Any]], _: int) -> dict[str, list[Any]]:
            first = [f" {_as_list(value)[0].strip()}" for value in chunk["answers"]]
            answers = tokenizer(first, add_special_tokens=False)["input_ids"]
            answers = [with_end(ids, tokenizer)[: self.config.answer_tokens] for ids in answers]
            return completion_columns(zip(self._prompts(chunk["question"], tokenizer), answers, strict=True))

        return in_chunks(rows, encode)

    def encode_test(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return encoded prompts and `right`, the list of right answers of each row."""
        right = [_as_list(value) for value in rows["answers"]]
        return self.encode_inputs(rows, tokenizer).add_column("right", right)

    def encode_inputs(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return encoded prompts, without answers."""

        def encode(chunk: dict[str, list[Any]], _: int) -> dict[str, list[Any]]:
            return prompt_columns(self._prompts(chunk["question"], tokenizer), self.config.max_length, tokenizer)

        return in_chunks(rows, encode)

    def answer(self, respondent: Respondent, encoded: Dataset) -> Outcome:
        """Return one generated line per row, with the right answers as references."""
        return Outcome(answers_of(encoded, self._lines(respondent, encoded), encoded["right"][:]))

    def predict(self, respondent: Respondent, encoded: Dataset, rows: Dataset) -> Columns:
        """Return `answer`, one generated line per row."""
        return {"answer": self._lines(respondent, encoded)}

    def _lines(self, respondent: Respondent, encoded: Dataset) -> list[str]:
        return respondent.texts(encoded, self.config.answer_tokens, one_line=True)

    def _prompts(self, questions: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        room = self.config.max_length - self.config.answer_tokens
        require(
            room > 1,
            f"data.answer_tokens {self.config.answer_tokens} leaves no room for the question in "
            f"data.max_length {self.config.max_length}; raise data.max_length",
        )
        template = self.entry.prompt or QUESTION_PROMPT
        texts = [template.format(question=question.strip()) for question in questions]
        prompts = [without_end(ids, tokenizer) for ids in tokenizer(texts)["input_ids"]]
        return [fit(prompt, [], room, tokenizer.bos_token_id)[0] for prompt in prompts]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
