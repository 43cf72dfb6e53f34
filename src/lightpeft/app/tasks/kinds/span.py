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

from lightpeft.app.tasks.answers import Answers, Columns, Outcome, require_finite, rounded
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
"""Columns of some rows, and their windows -> further columns, one value a window."""


@dataclass(frozen=True)
class AnswerSpan:
    """A right answer and where it is in its context."""

    text: str
    start: int
    """Number of its first character."""

    @property
    def span(self) -> tuple[int, int]:
        """Its first character, and the one behind its last."""
        return self.start, self.start + len(self.text)


class SpanTask(Task):
    """A head scores every token as the first and as the last of the answer; long contexts are read in windows.

    Rows have `question`, `context` and `answers`: {"text": [...], "answer_start": [...]} as in SQuAD, or texts alone,
    of which the first place in the context counts. A row becomes one encoded window or more.
    """

    head: ClassVar[TaskHead] = SPAN
    columns: ClassVar[tuple[str, ...]] = ("question", "context", "answers")
    targets: ClassVar[tuple[str, ...]] = ("answers",)
    cuts: ClassVar[bool] = False
    default_metrics: ClassVar[tuple[str, ...]] = ("text_match",)

    @property
    def null_threshold(self) -> float | None:
        """By how much an answer must be better than none to be given; None: every question is answered."""
        given = self.config.null_threshold
        return self.entry.null_threshold if given is None else given

    @classmethod
    def check(cls, rows: Dataset, entry: TaskEntry, what: str) -> None:
        """Questions and contexts are strings that are not blank; answers are where they are said to be."""
        cls.check_inputs(rows, entry, what)
        for (where, value), context in zip(values(rows, "answers", entry, what), rows["context"], strict=True):
            for answer in answer_places(value, context, where):
                found = context[slice(*answer.span)]
                require(
                    found == answer.text,
                    f'{where}: character {answer.start} of the context does not begin "{answer.text}" but "{found}"',
                )

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Windows with `start_positions` and `end_positions`, the tokens of the first right answer.

        Raises:
            LightPeftError: a question has no answer, and the task always gives one.
        """
        if self.null_threshold is None:
            for where, value in values(rows, "answers", self.entry, "data.train"):
                require(
                    _texts(value),
                    f"{where}: the question has no answer; set data.null_threshold (0 is usual) if the model should "
                    "tell, or drop the row",
                )
        return self._windows(rows, tokenizer, _labels)

    def encode_test(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """As `encode_inputs`, with the labels and `right`, the texts that are right."""

        def more(chunk: dict[str, list[Any]], windows: list[Window]) -> dict[str, list[Any]]:
            right = [_texts(value) for value in chunk["answers"]]
            return {
                **_labels(chunk, windows),
                **_location(chunk, windows),
                "right": [right[window.example] for window in windows],
            }

        return self._windows(rows, tokenizer, more)

    def encode_inputs(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Windows with what `window_of` needs (row, begins, ends, null), and the `context` to cut answers from."""
        return self._windows(rows, tokenizer, _location)

    def _windows(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, more: MoreColumns) -> Dataset:
        def encode(chunk: dict[str, list[Any]], start: int) -> dict[str, list[Any]]:
            windows = make_windows(chunk["question"], chunk["context"], tokenizer, self.config.max_length)
            columns = {name: [window.inputs[name] for window in windows] for name in windows[0].inputs}
            return {**columns, **more(chunk, windows), "row": [start + window.example for window in windows]}

        return in_chunks(rows, encode)

    def collator(self, tokenizer: PreTrainedTokenizerBase, multiple_of: int | None = None) -> Collator:
        """Batches padded to their longest window (or the next multiple), on the right, so that labels stay in place."""
        right = copy.copy(tokenizer)
        right.padding_side = "right"
        return Collator(DataCollatorWithPadding(right, pad_to_multiple_of=multiple_of))

    def answer(self, respondent: Respondent, encoded: Dataset) -> Outcome:
        """The best span of a row's windows, or none."""
        spans, losses = self._spans(respondent, encoded)
        texts = self._texts(spans, _by_row(encoded, "context"))
        return Outcome(Answers(texts, _by_row(encoded, "right")), {"loss": float(np.mean(losses))})

    def predict(self, respondent: Respondent, encoded: Dataset, rows: Dataset) -> Columns:
        """`answer`, and the `margin` by which it is better than none."""
        spans, _ = self._spans(respondent, encoded)
        return {
            "answer": self._texts(spans, rows["context"][:]),
            "margin": rounded(span.margin for span in spans),
        }

    def _texts(self, spans: list[Span], contexts: list[str]) -> list[str]:
        pairs = zip(spans, contexts, strict=True)
        return [answer_text(span, context, self.null_threshold) for span, context in pairs]

    def _spans(self, respondent: Respondent, encoded: Dataset) -> tuple[list[Span], list[float]]:
        """Every row's best span, and the cross-entropy of every window, in nats, where windows have labels.

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
                window, of_tokens = window_of(row), of_window[:, tokens]  # without padding, on whatever side
                finite[window.example] &= bool(of_tokens.isfinite().all())
                best = best_span(window, of_tokens[0], of_tokens[1], self.config.answer_tokens)
                spans[window.example].append(best)
                if SPAN_LABELS[0] in row:
                    targets = torch.tensor([row[name] for name in SPAN_LABELS])
                    losses.append(cross_entropy(of_tokens, targets).item())
        require_finite([finite[row] for row in range(len(spans))])
        return [best_of_windows(spans[row]) for row in range(len(spans))], losses


def _by_row(encoded: Dataset, column: str) -> list[Any]:
    """A column of windows, one value a row that they come from."""
    of_rows = dict(zip(encoded["row"], encoded[column], strict=True))
    return [of_rows[row] for row in range(len(of_rows))]


def window_of(row: Mapping[str, Any]) -> Window:
    """The window that a row of `SpanTask.encode_inputs` holds, without its tokens."""
    return Window(row["row"], {}, np.asarray(row["begins"]), np.asarray(row["ends"]), row["null"])


def answer_places(value: Any, context: str, where: str) -> list[AnswerSpan]:
    """Right answers that are not blank, from SQuAD's form or from texts; none where there is no answer.

    Raises:
        LightPeftError: neither, or a text is not in the context; `where` names the value.
    """
    if isinstance(value, Mapping):
        texts, starts = (_listed(value.get(name)) for name in ("text", "answer_start"))
        fits = len(texts) == len(starts) and all(map(_is_place, texts, starts))
        require(fits, f"{where}: {short_repr(value)} is not {_FORM}")
        return [AnswerSpan(text, start) for text, start in zip(texts, starts, strict=True) if text.strip()]
    require(all(isinstance(text, str) for text in _listed(value)), f"{where}: {short_repr(value)} is not {_FORM}")
    places = [AnswerSpan(text, context.find(text)) for text in _texts(value)]
    for answer in places:
        require(answer.start >= 0, f'{where}: "{answer.text}" is not in the context')
    return places


_FORM = 'a list of texts, or {"text": [...], "answer_start": [...]} with as many places in the context as texts'


def _is_place(text: Any, start: Any) -> bool:
    return isinstance(text, str) and isinstance(start, int) and start >= 0


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _texts(value: Any) -> list[str]:
    """Texts of right answers that are not blank."""
    texts = value.get("text") if isinstance(value, Mapping) else value
    return [text for text in _listed(texts) if text.strip()]


def _labels(chunk: dict[str, list[Any]], windows: list[Window]) -> dict[str, list[Any]]:
    """First and last token of every row's first answer."""
    places = [answer_places(*pair, "answers") for pair in zip(chunk["answers"], chunk["context"], strict=True)]
    labels = label_spans(windows, [of_row[0].span if of_row else None for of_row in places])
    return {name: [label[end] for label in labels] for end, name in enumerate(SPAN_LABELS)}


def _location(chunk: dict[str, list[Any]], windows: list[Window]) -> dict[str, list[Any]]:
    """Where windows are in their context, and the context."""
    return {
        "begins": [window.begins for window in windows],
        "ends": [window.ends for window in windows],
        "null": [window.null for window in windows],
        "context": [chunk["context"][window.example] for window in windows],
    }
