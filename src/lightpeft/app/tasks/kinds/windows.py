"""Extractive question answering: a long context as overlapping windows, and the best span of characters over them.

A model scores every token of a window as the first and as the last one of the answer. Where the window holds no answer,
both point at one token that stands for none: the CLS token or, for models that only look back, an end token that comes
last and so has seen question and context (Devlin et al. 2019, arXiv 1810.04805, section 4.3).
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
"""Tokens that a window has room for at least."""
NOWHERE = -torch.inf
"""Score of a span that cannot be an answer."""


@dataclass(frozen=True)
class Window:
    """The tokens of a question and of a part of its context."""

    example: int
    """Index of the question."""
    inputs: dict[str, list[int]]
    """input_ids, attention_mask, and token_type_ids if the tokenizer has them."""
    begins: np.ndarray
    """Int [tokens]: where in the context a token's characters begin; 0 for what is no part of the context."""
    ends: np.ndarray
    """Int [tokens]: where they end; 0 for what is no part of the context."""
    null: int
    """Position of the token that stands for no answer."""

    @property
    def in_context(self) -> np.ndarray:
        """Bool [tokens]: which ones stand for characters of the context."""
        return self.ends > self.begins


def make_windows(
    questions: Sequence[str],
    contexts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[Window]:
    """Windows of every question with its context, in order, one or more a question.

    Args:
        questions: cut to a quarter of a window.
        contexts: one a question.
        tokenizer: one with offsets; its padding side doesn't matter here.
        max_length: tokens of a window.

    Raises:
        LightPeftError: the tokenizer knows no offsets, or the windows are too short.
    """
    require(tokenizer.is_fast, "the tokenizer does not tell which characters a token stands for; use a fast one")
    require(
        max_length >= SHORTEST,
        f"data.max_length is {max_length}; a window of question and context needs at least {SHORTEST} tokens",
    )
    closing = _closing_token(tokenizer)
    encoded = tokenizer(
        _shortened(questions, tokenizer, max_length // 4),
        list(contexts),
        return_offsets_mapping=True,
        verbose=False,  # it would warn of texts that are longer than the model's longest
    )
    windows = []
    for example in range(len(contexts)):
        parts = encoded.sequence_ids(example)
        for places in _places(parts, max_length - len(closing), max_length // 3):
            windows.append(_window(encoded, example, parts, places, closing, tokenizer))
    return windows


def _places(parts: Sequence[int | None], length: int, shared: int) -> Iterator[list[int]]:
    """Where the tokens of each window are among those of a question with its whole context.

    The tokenizer could cut windows itself, but releases 0.23.1 and 0.23.2 of tokenizers lose what is behind the first.

    Args:
        parts: of each token, 1 in the context.
        length: tokens of a window.
        shared: context tokens that a window shares with the next one.
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
    """The end token, if nothing that the tokenizer adds by itself can stand for no answer."""
    ids = tokenizer("a", "b")["input_ids"]
    if tokenizer.cls_token_id in ids or ids[-1] == tokenizer.eos_token_id:
        return []
    require(
        tokenizer.eos_token_id is not None, "the tokenizer has neither a CLS nor an end token to stand for no answer"
    )
    return [tokenizer.eos_token_id]


def _shortened(questions: Iterable[str], tokenizer: PreTrainedTokenizerBase, most: int) -> list[str]:
    """Questions of at most `most` tokens, with a line end behind where the tokenizer puts nothing between texts."""
    texts = [question.strip() for question in questions]
    options = {"add_special_tokens": False, "truncation": True, "max_length": most, "return_offsets_mapping": True}
    offsets = tokenizer(texts, **options)["offset_mapping"]
    texts = [text[: spans[-1][1]] if len(spans) == most else text for text, spans in zip(texts, offsets, strict=True)]
    return texts if tokenizer.sep_token_id is not None else [f"{text}\n" for text in texts]


def _window(
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
    """First and last token of the answer in every window; the null token twice where it isn't there whole.

    Args:
        windows: all those of some questions.
        spans: where the answer of each question begins and ends in its context; None: it has none.
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
    """Positions of the context's tokens that share characters with the span."""
    begin, end = span or (0, 0)
    return np.flatnonzero(window.in_context & (window.ends > begin) & (window.begins < end))


@dataclass(frozen=True)
class Span:
    """What a model takes for the answer to a question."""

    begin: int
    """First character in the context."""
    end: int
    """The character behind the last one."""
    score: float
    """Logit of its first token as the first plus that of its last token as the last."""
    null_score: float
    """The same of no answer."""

    @property
    def margin(self) -> float:
        """How much better it is than no answer."""
        return self.score - self.null_score


def best_span(window: Window, start: Tensor, end: Tensor, most_tokens: int) -> Span:
    """The best answer of one window.

    Args:
        window: with n tokens.
        start: logits [n] of being an answer's first token.
        end: logits [n] of being its last token.
        most_tokens: tokens of an answer at most.
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
    """The best answer to a question from those of its windows; of no answer the lowest score counts."""
    best = max(spans, key=lambda span: span.score)
    return Span(best.begin, best.end, best.score, min(span.null_score for span in spans))


def answer_text(span: Span, context: str, null_threshold: float | None) -> str:
    """The answer's characters; "" unless it is better than none by more than the threshold (None: never "")."""
    if null_threshold is not None and span.margin <= null_threshold:
        return ""
    return context[span.begin : span.end].strip()
