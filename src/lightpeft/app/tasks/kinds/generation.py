"""Short answers that a causal language model writes itself."""

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

PROMPT = "Question: {question}\nAnswer:"
"""Where the entry has none."""


class GenerationTask(CompletionTask):
    """Train on the prompt and the first right answer; answer by generating one line, which any right answer may match.

    Rows have `question` and `answers`, a list of texts or one text.
    """

    columns: ClassVar[tuple[str, ...]] = ("question", "answers")
    targets: ClassVar[tuple[str, ...]] = ("answers",)
    writes: ClassVar[bool] = True
    default_metrics: ClassVar[tuple[str, ...]] = ("text_match",)

    @classmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Questions are strings that are not blank, and have one answer at least that is none either."""
        cls.check_inputs(rows, entry, what)
        for where, value in values(rows, "answers", entry, what):
            require(value not in (None, []), f"{where}: there is no answer; fill it in or drop the row")
            for text in _listed(value):
                check_text(text, where)

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Prompt, first answer and end token; labels are -100 on the prompt.

        Both are tokenised apart, since generation starts from the prompt's own tokens. Of `data.max_length` tokens the
        answer gets `data.answer_tokens`, and a longer prompt loses its beginning (the start token stays).
        """

        def encode(chunk: dict[str, list[Any]], _: int) -> dict[str, list[Any]]:
            first = [f" {_listed(value)[0].strip()}" for value in chunk["answers"]]
            answers = tokenizer(first, add_special_tokens=False)["input_ids"]
            answers = [with_end(ids, tokenizer)[: self.config.answer_tokens] for ids in answers]
            return completion_columns(zip(self._prompts(chunk["question"], tokenizer), answers, strict=True))

        return in_chunks(rows, encode)

    def encode_test(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """As `encode_inputs`, with `right`, the texts that are right."""
        right = [_listed(value) for value in rows["answers"]]
        return self.encode_inputs(rows, tokenizer).add_column("right", right)

    def encode_inputs(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """The prompts."""

        def encode(chunk: dict[str, list[Any]], _: int) -> dict[str, list[Any]]:
            return prompt_columns(self._prompts(chunk["question"], tokenizer), self.config.max_length, tokenizer)

        return in_chunks(rows, encode)

    def answer(self, respondent: Respondent, encoded: Dataset) -> Outcome:
        """One line that the model writes."""
        return Outcome(answers_of(encoded, self._lines(respondent, encoded), encoded["right"][:]))

    def predict(self, respondent: Respondent, encoded: Dataset, rows: Dataset) -> Columns:
        """`answer`, one line that the model writes."""
        return {"answer": self._lines(respondent, encoded)}

    def _lines(self, respondent: Respondent, encoded: Dataset) -> list[str]:
        return respondent.texts(encoded, self.config.answer_tokens, one_line=True)

    def _prompts(self, questions: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        room = self.config.max_length - self.config.answer_tokens
        require(
            room > 1,
            f"data.answer_tokens is {self.config.answer_tokens}, which leaves no room for the question in "
            f"data.max_length {self.config.max_length}",
        )
        template = self.entry.prompt or PROMPT
        texts = [template.format(question=question.strip()) for question in questions]
        prompts = [without_end(ids, tokenizer) for ids in tokenizer(texts)["input_ids"]]
        return [fit(prompt, [], room, tokenizer.bos_token_id)[0] for prompt in prompts]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
