"""Extractive question answering: a long context as overlapping windows, and the best span of characters over them.

A model scores every token of a window as the start and as the end of the answer. In a window without the answer, both
point at the null token: the CLS token or, for causal models, a final end token, which has seen question and context
(Devlin et al. 2019, arXiv 1810.04805, section 4.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from lightpeft.errors import require

SHORTEST = 32
"""Fewest tokens of a window."""
NOWHERE = -torch.inf
"""Score of a span outside the context."""


@dataclass(frozen=True)
class Window:
    """The tokens of a question and of a part of its context."""

    example: int
    """Index of the question."""
    inputs: dict[str, list[int]]
    """input_ids, attention_mask, and token_type_ids if the tokenizer has them."""
    begins: np.ndarray
    """Int [tokens]: first character of each token in the context; 0 outside the context."""
    ends: np.ndarray
    """Int [tokens]: end of each token's characters in the context (exclusive); 0 outside the context."""
    null: int
    """Position of the null token, which stands for no answer."""

    @property
    def in_context(self) -> np.ndarray:
        """Bool [tokens]: True for tokens of the context."""
        return self.ends > self.begins


def make_windows(
    questions: Sequence[str],
    contexts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[Window]:
    """Return the windows of every question with its context, in order, one or more per question.

    Args:
        questions: texts; each is truncated to a quarter of a window.
        contexts: one per question.
        tokenizer: a fast tokenizer, which gives character offsets.
        max_length: most tokens of a window.

    Raises:
        LightPeftError: the tokenizer gives no offsets, or `max_length` is less than `SHORTEST`.
    """
    require(tokenizer.is_fast, "the tokenizer gives no character offsets of tokens; use a fast tokenizer")
    require(
        max_length >= SHORTEST,
        f"data.max_length is {max_length}; a window of question and context needs at least {SHORTEST} tokens",
    )
    closing = _closing_token(tokenizer)
    encoded = tokenizer(
        _shorten_questions(questions, tokenizer, max_length // 4),
        list(contexts),
        return_offsets_mapping=True,
        verbose=False,  # it would warn about texts longer than the model's limit
    )
    windows = []
    for example in range(len(contexts)):
        parts = encoded.sequence_ids(example)
        for places in _window_places(parts, max_length - len(closing), max_length // 3):
            windows.append(_make_window(encoded, example, parts, places, closing, tokenizer))
    return windows


def _window_places(parts: Sequence[int | None], length: int, shared: int) -> Iterator[list[int]]:
    """Yield the positions of each window's tokens among those of a question with its whole context.

    The tokenizer could split windows itself, but tokenizers 0.23.1 and 0.23.2 lose all windows after the first.

    Args:
        parts: sequence id of each token: 1 in the context.
        length: most tokens of a window.
        shared: context tokens that two successive windows share.
    """
    context = [place for place, part in enumerate(parts) if part == 1]
    if not context:
        yield list(range(len(parts)))
        return
    before, behind = range(context[0]), range(context[-1] + 1, len(parts))
    room = length - len(before) - len(behind)
    for begin in range(0, max(len(context) - shared, 1), room - shared):
        yield [*before, *context[begin : begin + room], *behind]


def _closing_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return [end token] if the tokenizer adds no token that can be the null token, else []."""
    ids = tokenizer("a", "b")["input_ids"]
    if tokenizer.cls_token_id in ids or ids[-1] == tokenizer.eos_token_id:
        return []
    require(
        tokenizer.eos_token_id is not None,
        "the tokenizer has neither a CLS nor an end token to mark no answer; set one",
    )
    return [tokenizer.eos_token_id]


def _shorten_questions(questions: Iterable[str], tokenizer: PreTrainedTokenizerBase, most: int) -> list[str]:
    """Truncate questions to `most` tokens, and append a newline if the tokenizer has no separator token."""
    texts = [question.strip() for question in questions]
    options = {"add_special_tokens": False, "truncation": True, "max_length": most, "return_offsets_mapping": True}
    offsets = tokenizer(texts, **options)["offset_mapping"]
    texts = [text[: spans[-1][1]] if len(spans) == most else text for text, spans in zip(texts, offsets, strict=True)]
    return texts if tokenizer.sep_token_id is not None else [f"{text}\n" for text in texts]


def _make_window(
    encoded: Any,
    example: int,
    parts: Sequence[int | None],
    places: Sequence[int],
    closing: list[int],
    tokenizer: PreTrainedTokenizerBase,
) -> Window:
    def taken(values: Sequence[Any]) -> list[Any]:
        return [values[place] for place in places]

    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded]
    inputs = {name: taken(encoded[name][example]) for name in names}
    for name in names if closing else ():
        inputs[name].append(closing[0] if name == "input_ids" else inputs[name][-1])
    offsets = np.array([*taken(encoded["offset_mapping"][example]), *((0, 0) for _ in closing)], dtype=np.int64)
    offsets[[part != 1 for part in (*taken(parts), *(None for _ in closing))]] = 0
    ids = inputs["input_ids"]
    null = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else len(ids) - 1
    return Window(example, inputs, offsets[:, 0], offsets[:, 1], null)


def label_spans(windows: Sequence[Window], spans: Sequence[tuple[int, int] | None]) -> list[tuple[int, int]]:
    """Return (first, last) token of the answer in every window; the null token twice if it is not there completely.

    Args:
        windows: all windows of some questions.
        spans: character range of the answer of each question in its context; None: no answer.
    """
    hits = [_overlapping(window, spans[window.example]) for window in windows]
    reach: dict[int, tuple[int, int]] = {}
    for window, hit in zip(windows, hits, strict=True):
        if hit.size:
            before = reach.get(window.example, (window.begins[hit[0]], 0))
            reach[window.example] = min(before[0], window.begins[hit[0]]), max(before[1], window.ends[hit[-1]])
    return [
        (int(hit[0]), int(hit[-1]))
        if hit.size and (window.begins[hit[0]], window.ends[hit[-1]]) == reach[window.example]
        else (window.null, window.null)
        for window, hit in zip(windows, hits, strict=True)
    ]


def _overlapping(window: Window, span: tuple[int, int] | None) -> np.ndarray:
    """Return the positions of the context's tokens that share characters with the span."""
    begin, end = span or (0, 0)
    return np.flatnonzero(window.in_context & (window.ends > begin) & (window.begins < end))


@dataclass(frozen=True)
class Span:
    """An answer that a model gives: a range of characters, with scores."""

    begin: int
    """Index of its first character in the context."""
    end: int
    """Index after its last character."""
    score: float
    """Start logit of its first token plus end logit of its last token."""
    null_score: float
    """Start logit plus end logit of the null token."""

    @property
    def margin(self) -> float:
        """Score minus the score of no answer."""
        return self.score - self.null_score


def best_span(window: Window, start: Tensor, end: Tensor, most_tokens: int) -> Span:
    """Return the span with the highest score in one window.

    Args:
        window: a window of n tokens.
        start: start logits [n].
        end: end logits [n].
        most_tokens: most tokens of an answer.
    """
    null_score = float(start[window.null] + end[window.null])
    outside = torch.from_numpy(~window.in_context)
    start, end = start.float().masked_fill(outside, NOWHERE), end.float().masked_fill(outside, NOWHERE)
    scores = start.unsqueeze(1) + pad(end, (0, most_tokens - 1), value=NOWHERE).unfold(0, most_tokens, 1)
    score, place = scores.flatten().max(0)
    first, more = divmod(int(place), most_tokens)
    if score == NOWHERE:  # no character of the context is in this window
        return Span(0, 0, NOWHERE, null_score)
    return Span(int(window.begins[first]), int(window.ends[first + more]), float(score), null_score)


def best_of_windows(spans: Sequence[Span]) -> Span:
    """Return the best of the spans of a question's windows, with the lowest score of no answer among them."""
    best = max(spans, key=lambda span: span.score)
    return Span(best.begin, best.end, best.score, min(span.null_score for span in spans))


def answer_text(span: Span, context: str, null_threshold: float | None) -> str:
    """Return the text of the answer; "" if its margin is at most `null_threshold` (None: never "")."""
    if null_threshold is not None and span.margin <= null_threshold:
        return ""
    return context[span.begin : span.end].strip()
