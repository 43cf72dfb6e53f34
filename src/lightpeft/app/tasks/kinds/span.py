"""Extractive question answering: the answer to a question is a piece of its context."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from lightpeft.app.tasks.answers import Answers, Columns, Outcome, require_finite, round_all
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.kinds.windows import (
    Span,
    Window,
    answer_text,
    best_of_windows,
    best_span,
    label_spans,
    make_windows,
)
from lightpeft.app.tasks.respondent import Respondent
from lightpeft.app.tasks.rows.columns import values
from lightpeft.app.tasks.tokens import Collator, in_chunks, take_rows
from lightpeft.config import TaskEntry
from lightpeft.config.validation import short_repr
from lightpeft.errors import require
from lightpeft.models.batches import SPAN_LABELS
from lightpeft.models.task_heads import SPAN, TaskHead

MoreColumns = Callable[[dict[str, list[Any]], list[Window]], dict[str, list[Any]]]
"""Function of the columns of some rows and their windows; returns further columns, one value per window."""


@dataclass(frozen=True)
class AnswerSpan:
    """A right answer and its place in the context."""

    text: str
    start: int
    """Index of its first character in the context."""

    @property
    def span(self) -> tuple[int, int]:
        """Character range (start, end) in the context, end exclusive."""
        return self.start, self.start + len(self.text)


class SpanTask(Task):
    """A head scores every token as the start and as the end of the answer; long contexts are split into windows.

    Rows have `question`, `context` and `answers`: {"text": [...], "answer_start": [...]} as in SQuAD, or texts alone,
    which are located at their first occurrence in the context. A row gives one or more encoded windows.
    """

    head: ClassVar[TaskHead] = SPAN
    columns: ClassVar[tuple[str, ...]] = ("question", "context", "answers")
    targets: ClassVar[tuple[str, ...]] = ("answers",)
    cuts: ClassVar[bool] = False
    default_metrics: ClassVar[tuple[str, ...]] = ("text_match",)

    @property
    def null_threshold(self) -> float | None:
        """Margin by which an answer must outscore no answer to be given; None: every question is answered."""
        given = self.config.null_threshold
        return self.entry.null_threshold if given is None else given

    @classmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Raise `LightPeftError` unless questions and contexts are not blank and answers stand at their place."""
        cls.check_inputs(rows, entry, what)
        for (where, value), context in zip(values(rows, "answers", entry, what), rows["context"], strict=True):
            for answer in answer_places(value, context, where):
                found = context[slice(*answer.span)]
                require(
                    found == answer.text,
                    f'{where}: answer_start {answer.start} of "{answer.text}" is wrong; "{found}" is there',
                )

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return windows with `start_positions` and `end_positions`, the tokens of the first right answer.

        Raises:
            LightPeftError: a question has no answer, but `null_threshold` is None.
        """
        if self.null_threshold is None:
            for where, value in values(rows, "answers", self.entry, "data.train"):
                require(
                    _texts(value),
                    f"{where}: the question has no answer; set data.null_threshold (usually 0) to learn unanswerable "
                    "questions, or drop the row",
                )
        return self._windows(rows, tokenizer, _label_columns)

    def encode_test(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return the columns of `encode_inputs`, the label positions, and `right`, the right answers of the row."""

        def more(chunk: dict[str, list[Any]], windows: list[Window]) -> dict[str, list[Any]]:
            right = [_texts(value) for value in chunk["answers"]]
            return {
                **_label_columns(chunk, windows),
                **_context_columns(chunk, windows),
                "right": [right[window.example] for window in windows],
            }

        return self._windows(rows, tokenizer, more)

    def encode_inputs(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Return windows with the columns of `window_of` (row, begins, ends, null) and `context` for the answers."""
        return self._windows(rows, tokenizer, _context_columns)

    def _windows(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, more: MoreColumns) -> Dataset:
        def encode(chunk: dict[str, list[Any]], start: int) -> dict[str, list[Any]]:
            windows = make_windows(chunk["question"], chunk["context"], tokenizer, self.config.max_length)
            columns = {name: [window.inputs[name] for window in windows] for name in windows[0].inputs}
            return {**columns, **more(chunk, windows), "row": [start + window.example for window in windows]}

        return in_chunks(rows, encode)

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
        """Return the collator: pads to the longest window, or the next multiple, on the right: labels are positions."""
        right = copy.copy(tokenizer)
        right.padding_side = "right"
        return Collator(DataCollatorWithPadding(right, pad_to_multiple_of=multiple_of))

    def answer(self, respondent: Respondent, encoded: Dataset) -> Outcome:
        """Return the text of the best span over each row's windows ("" for none), and the mean window loss in nats."""
        spans, losses = self._spans(respondent, encoded)
        texts = self._texts(spans, _one_per_row(encoded, "context"))
        return Outcome(Answers(texts, _one_per_row(encoded, "right")), {"loss": float(np.mean(losses))})

    def predict(self, respondent: Respondent, encoded: Dataset, rows: Dataset) -> Columns:
        """Return `answer`, and `margin`, the score of the best span minus that of no answer."""
        spans, _ = self._spans(respondent, encoded)
        return {
            "answer": self._texts(spans, rows["context"][:]),
            "margin": round_all(span.margin for span in spans),
        }

    def _texts(self, spans: list[Span], contexts: list[str]) -> list[str]:
        pairs = zip(spans, contexts, strict=True)
        return [answer_text(span, context, self.null_threshold) for span, context in pairs]

    def _spans(self, respondent: Respondent, encoded: Dataset) -> tuple[list[Span], list[float]]:
        """Return the best span of every row, and the cross-entropy (nats) of every window that has labels.

        Raises:
            LightPeftError: there is no row, or logits are not finite.
        """
        spans: dict[int, list[Span]] = defaultdict(list)
        finite: dict[int, bool] = defaultdict(lambda: True)
        losses = []
        for numbers, batch, output in respondent.outputs(encoded, "Answering"):
            real = batch["attention_mask"].bool()
            logits = torch.stack([output.start_logits, output.end_logits], dim=1).float().cpu()
            for row, of_window, tokens in zip(take_rows(encoded, numbers), logits, real, strict=True):
                window, of_tokens = window_of(row), of_window[:, tokens]  # without padding on either side
                finite[window.example] &= bool(of_tokens.isfinite().all())
                best = best_span(window, of_tokens[0], of_tokens[1], self.config.answer_tokens)
                spans[window.example].append(best)
                if SPAN_LABELS[0] in row:
                    targets = torch.tensor([row[name] for name in SPAN_LABELS])
                    losses.append(cross_entropy(of_tokens, targets).item())
        require_finite([finite[row] for row in range(len(spans))])
        return [best_of_windows(spans[row]) for row in range(len(spans))], losses


def _one_per_row(encoded: Dataset, column: str) -> list[Any]:
    """Return one value per row of a column that is equal in all windows of a row."""
    of_rows = dict(zip(encoded["row"], encoded[column], strict=True))
    return [of_rows[row] for row in range(len(of_rows))]


def window_of(row: Mapping[str, Any]) -> Window:
    """Return the `Window` of an encoded row of `SpanTask.encode_inputs`, without its tokens."""
    return Window(row["row"], {}, np.asarray(row["begins"]), np.asarray(row["ends"]), row["null"])


def answer_places(value: Any, context: str, where: str) -> list[AnswerSpan]:
    """Return the right answers that are not blank, from SQuAD's format or from texts; empty without an answer.

    Args:
        where: names the value in errors.

    Raises:
        LightPeftError: the value has another format, or a text is not in the context.
    """
    if isinstance(value, Mapping):
        texts, starts = (_list_of(value.get(name)) for name in ("text", "answer_start"))
        fits = len(texts) == len(starts) and all(map(_is_place, texts, starts))
        require(fits, f"{where}: {short_repr(value)} is not {_ANSWERS_FORMAT}")
        return [AnswerSpan(text, start) for text, start in zip(texts, starts, strict=True) if text.strip()]
    require(
        all(isinstance(text, str) for text in _list_of(value)), f"{where}: {short_repr(value)} is not {_ANSWERS_FORMAT}"
    )
    places = [AnswerSpan(text, context.find(text)) for text in _texts(value)]
    for answer in places:
        require(
            answer.start >= 0, f'{where}: the answer "{answer.text}" is not in the context; correct it or drop the row'
        )
    return places


_ANSWERS_FORMAT = (
    'a list of texts, or {"text": [...], "answer_start": [...]} with as many places in the context as texts'
)


def _is_place(text: Any, start: Any) -> bool:
    return isinstance(text, str) and isinstance(start, int) and start >= 0


def _list_of(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _texts(value: Any) -> list[str]:
    """Return the texts of right answers that are not blank."""
    texts = value.get("text") if isinstance(value, Mapping) else value
    return [text for text in _list_of(texts) if text.strip()]


def _label_columns(chunk: dict[str, list[Any]], windows: list[Window]) -> dict[str, list[Any]]:
    """Return `start_positions` and `end_positions` of each window, for the first answer of its row."""
    places = [answer_places(*pair, "answers") for pair in zip(chunk["answers"], chunk["context"], strict=True)]
    labels = label_spans(windows, [of_row[0].span if of_row else None for of_row in places])
    return {name: [label[end] for label in labels] for end, name in enumerate(SPAN_LABELS)}


def _context_columns(chunk: dict[str, list[Any]], windows: list[Window]) -> dict[str, list[Any]]:
    """Return, per window, the character range of each token, the null token, and the context."""
    return {
        "begins": [window.begins for window in windows],
        "ends": [window.ends for window in windows],
        "null": [window.null for window in windows],
        "context": [chunk["context"][window.example] for window in windows],
    }
