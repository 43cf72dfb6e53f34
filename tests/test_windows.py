"""Windows over long contexts: no answer gets lost between them, and what is cut out of the context is the answer."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightpeft.app.tasks.kinds.windows import (
    Span,
    Window,
    answer_text,
    best_of_windows,
    best_span,
    label_spans,
    make_windows,
)
from lightpeft.errors import LightPeftError

WORDS = ("where", "who", "stone", "river", "mountain", "Łódź", "電影", "naïve", "42", "!")


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, [CLS] question [SEP] context [SEP], as BERT has it."""
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **special)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte and nothing around them, as decoders have it; characters beyond ASCII take several tokens."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary | {"<end>": 256}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", padding_side="left")


TOKENIZERS = {"encoder": encoder_tokenizer(), "decoder": byte_tokenizer()}
tokenizers = st.sampled_from(sorted(TOKENIZERS)).map(TOKENIZERS.__getitem__)
words = st.sampled_from(WORDS)
texts = st.lists(words, min_size=1, max_size=60).map(" ".join)
spaces = st.sampled_from((" ", "  ", "\n", "\t "))


@st.composite
def answered(draw: Callable) -> tuple[str, tuple[int, int]]:
    """A context, and the place of some of its words in it."""
    pieces = draw(st.lists(st.tuples(words, spaces), min_size=1, max_size=80))
    first = draw(st.integers(0, len(pieces) - 1))
    last = draw(st.integers(first, min(first + 8, len(pieces) - 1)))
    starts = np.cumsum([0, *(len(word) + len(space) for word, space in pieces)]).tolist()
    return "".join(word + space for word, space in pieces), (starts[first], starts[last] + len(pieces[last][0]))


@given(tokenizers, texts, answered(), st.integers(32, 64))
def test_the_answer_is_found_in_some_window(
    tokenizer: PreTrainedTokenizerFast, question: str, row: tuple[str, tuple[int, int]], max_length: int
) -> None:
    context, (begin, end) = row
    windows = make_windows([question], [context], tokenizer, max_length)
    labels = label_spans(windows, [(begin, end)])
    found = [
        context[window.begins[first] : window.ends[last]]
        for window, (first, last) in zip(windows, labels, strict=True)
        if first != window.null
    ]
    assert set(found) <= {context[begin:end]}
    tokens = len(tokenizer(context[begin:end], add_special_tokens=False)["input_ids"])
    if tokens <= max_length // 3 + 1:  # what windows share with the next one, and the token at which it begins
        assert found


@given(tokenizers, texts, answered(), st.integers(32, 64))
def test_windows_cover_the_context_and_stay_within_length(
    tokenizer: PreTrainedTokenizerFast, question: str, row: tuple[str, tuple[int, int]], max_length: int
) -> None:
    context, _ = row
    windows = make_windows([question, question], [context, "river"], tokenizer, max_length)
    assert [window.example for window in windows] == [0] * (len(windows) - 1) + [1]
    covered = np.zeros(len(context), dtype=bool)
    for window in windows[:-1]:
        assert all(len(values) == len(window.begins) <= max_length for values in window.inputs.values())
        assert not window.in_context[window.null]
        for begin, end in zip(window.begins, window.ends, strict=True):
            covered[begin:end] = True
    assert all(covered[place] or context[place].isspace() for place in range(len(context)))


def test_null_stands_at_cls_or_last() -> None:
    (window,) = make_windows(["who ?"], ["river stone"], TOKENIZERS["encoder"], 32)
    assert window.inputs["input_ids"][window.null] == 2 and window.null == 0
    assert window.inputs["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    (window,) = make_windows([" who?"], ["river"], TOKENIZERS["decoder"], 32)
    assert window.inputs["input_ids"][window.null] == 256 and window.null == len(window.begins) - 1
    assert TOKENIZERS["decoder"].decode(window.inputs["input_ids"]) == "who?\nriver<end>"


def test_answers_that_are_nowhere_whole_are_null_everywhere() -> None:
    tokenizer = TOKENIZERS["encoder"]
    context = " ".join(["river"] * 200)
    windows = make_windows(["who"], [context], tokenizer, 32)
    assert len(windows) > 6
    assert label_spans(windows, [(0, len(context))]) == [(0, 0)] * len(windows)
    assert label_spans(windows, [None]) == [(0, 0)] * len(windows)


def test_questions_are_cut_to_a_quarter() -> None:
    tokenizer = TOKENIZERS["encoder"]
    (window,) = make_windows(["who " * 100], ["river stone"], tokenizer, 32)
    assert window.inputs["input_ids"].count(tokenizer.convert_tokens_to_ids("who")) == 8
    assert window.in_context.sum() == 2


def test_windows_that_are_too_short() -> None:
    with pytest.raises(LightPeftError, match="data.max_length is 31"):
        make_windows(["who"], ["river"], TOKENIZERS["encoder"], 31)


logits = st.lists(st.floats(-10, 10, width=32), min_size=12, max_size=12)


@given(logits, logits, st.lists(st.booleans(), min_size=12, max_size=12), st.integers(1, 14))
def test_best_span_is_the_best_of_all_spans(
    start: list[float], end: list[float], inside: list[bool], most: int
) -> None:
    assume(any(inside[1:]))
    ends = np.array([0, *(index + 1 if real else 0 for index, real in enumerate(inside[1:], 1))])
    begins = np.where(ends > 0, np.arange(12), 0)
    window = Window(0, {}, begins, ends, null=0)
    span = best_span(window, torch.tensor(start), torch.tensor(end), most)
    scores = {
        (first, last): np.float32(start[first]) + np.float32(end[last])
        for first in range(1, 12)
        for last in range(first, min(first + most, 12))
        if inside[first] and inside[last]
    }
    assert span.score == pytest.approx(max(scores.values()))
    assert scores[span.begin, span.end - 1] == span.score
    assert span.null_score == np.float32(start[0]) + np.float32(end[0])


def test_window_without_context_has_no_answer() -> None:
    window = Window(0, {}, np.zeros(3, dtype=int), np.zeros(3, dtype=int), null=0)
    span = best_span(window, torch.ones(3), torch.ones(3), 5)
    assert span.score == -math.inf and span.null_score == 2.0
    other = Span(4, 9, 1.0, 3.0)
    assert best_of_windows([span, other]) == Span(4, 9, 1.0, 2.0)


def test_threshold_decides_between_an_answer_and_none() -> None:
    span = best_of_windows([Span(0, 5, 3.0, 9.0), Span(6, 12, 4.0, 1.0), Span(0, 1, -2.0, 7.0)])
    assert span == Span(6, 12, 4.0, 1.0) and span.margin == 3.0
    context = "stone river"
    assert answer_text(span, context, None) == "river"
    assert answer_text(span, context, 2.5) == "river"
    assert answer_text(span, context, 3.0) == ""
    assert answer_text(Span(5, 9, 0.0, 1.0), context, None) == "riv"
