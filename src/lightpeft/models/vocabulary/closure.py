"""Selection of the tokens to keep: required tokens, and the tokens without which some text could not be tokenized.

A text whose tokens are all kept is tokenized as before, because kept tokens keep their ranks: the longest match
(WordPiece), the first merge (BPE) and the best path (Unigram) do not change. Other texts get more pieces, down to
single characters or bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightpeft.errors import require

KEEP_ALL = "keep all its tokens (of a run, light.remove.vocabulary: keep)"
"""Remedy where a vocabulary cannot be cut."""
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""Pattern of a piece for one byte of a character that has no piece."""


def kept_tokens(tokenizer: PreTrainedTokenizerBase, needed: Iterable[int]) -> tuple[int, ...]:
    """Return the ids of the tokens to keep if `needed` are required, ascending.

    They include special and added tokens; single characters and bytes; for BPE, all intermediate merges of a kept
    token; and fallbacks of the model for characters without a piece.

    Raises:
        LightPeftError: the tokenizer is no fast one, or its kind does not split words.
    """
    description = describe(tokenizer)
    model, ids = description["model"], token_ids(description)
    known = {number: token for token, number in ids.items()}
    fixed = {*_fixed_ids(description), *tokenizer.all_special_ids} & known.keys()
    of_parts = _CLOSURES[model["type"]](model, [known[number] for number in set(needed) & known.keys() - fixed])
    return tuple(sorted(fixed | {ids[token] for token in of_parts} | (set(needed) & known.keys())))


def describe(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the content of a fast tokenizer's tokenizer.json.

    Raises:
        LightPeftError: the tokenizer is no fast one, or of a kind whose vocabulary cannot be cut.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    name = type(tokenizer).__name__
    require(backend is not None, f"the vocabulary of {name} cannot be cut: it is not a fast tokenizer; {KEEP_ALL}")
    description: dict[str, Any] = json.loads(backend.to_str())
    model = description["model"]
    known = " and ".join([", ".join([*_CLOSURES][:-1]), [*_CLOSURES][-1]])
    cuttable = f"the vocabulary of {name} cannot be cut: its kind is {model['type']}, not one of {known}"
    require(model["type"] in _CLOSURES, f"{cuttable}; {KEEP_ALL}")
    marked = model.get("end_of_word_suffix") or (model["type"] == "BPE" and model.get("continuing_subword_prefix"))
    require(not marked, f"the vocabulary of {name} cannot be cut: its BPE marks word parts ({marked}); {KEEP_ALL}")
    return description


def token_ids(description: Mapping[str, Any]) -> dict[str, int]:
    """Return token -> id for all tokens of a tokenizer.json, added ones included."""
    vocabulary = description["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in description["added_tokens"]}}


def renumber(description: Mapping[str, Any], number: Callable[[int], int]) -> None:
    """Renumber all ids of a tokenizer.json outside its model, in place.

    Raises:
        LightPeftError: the post-processor has an unknown type.
    """
    for token in description["added_tokens"]:
        token["id"] = number(token["id"])
    if description.get("padding"):
        description["padding"]["pad_id"] = number(description["padding"]["pad_id"])
    for step in _steps(description.get("post_processor")):
        kind = step["type"]
        require(kind in _AROUND, f"the vocabulary cannot be cut: the post-processor {kind} is unknown")
        _AROUND[kind](step, number)


def _steps(processor: Mapping[str, Any] | None) -> Iterator[Any]:
    if processor is not None and processor["type"] == "Sequence":
        for step in processor["processors"]:
            yield from _steps(step)
    elif processor is not None:
        yield processor


def _renumber_template(step: Mapping[str, Any], number: Callable[[int], int]) -> None:
    for token in step["special_tokens"].values():
        token["ids"] = [number(each) for each in token["ids"]]


def _renumber_pair(step: dict[str, Any], number: Callable[[int], int]) -> None:
    for name in ("sep", "cls"):
        token, old = step[name]
        step[name] = [token, number(old)]


_AROUND: dict[str, Callable[[Any, Callable[[int], int]], None]] = {
    "TemplateProcessing": _renumber_template,
    "BertProcessing": _renumber_pair,
    "RobertaProcessing": _renumber_pair,
    "ByteLevel": lambda step, number: None,
}
"""Type of a post-processor -> function that renumbers its ids."""


def _fixed_ids(description: Mapping[str, Any]) -> set[int]:
    """Return the ids of added tokens, of padding, and of tokens that the post-processor inserts."""
    found: set[int] = set()

    def note(number: int) -> int:
        found.add(number)
        return number

    renumber(description, note)
    return found


def _wordpiece(model: Mapping[str, Any], needed: list[str]) -> Iterator[str]:
    """Yield the tokens of WordPiece to keep: needed ones, and single characters in both forms.

    Tokens with a character that has no token of its own are kept as well.
    """
    prefix = model["continuing_subword_prefix"]
    yield from needed
    yield model["unk_token"]
    for token in model["vocab"]:
        body = token.removeprefix(prefix)
        first = prefix if token.startswith(prefix) else ""
        forms = [mark + character for mark, character in zip([first] + [prefix] * len(body), body, strict=False)]
        if len(body) <= 1 or any(form not in model["vocab"] for form in forms):
            yield token


def _bpe(model: Mapping[str, Any], needed: list[str]) -> Iterator[str]:
    """Yield the tokens of BPE to keep: single characters and bytes, needed tokens, and their intermediate merges."""
    ranks = {tuple(merge): rank for rank, merge in reversed(list(enumerate(model["merges"])))}
    yield from _unknown_token(model)
    yield from (token for token in model["vocab"] if len(token) == 1 or _BYTE.fullmatch(token))
    for token in needed:
        yield token
        yield from () if _BYTE.fullmatch(token) else _merge_results(token, ranks)


def _merge_results(token: str, ranks: Mapping[tuple[str, ...], int]) -> Iterator[str]:
    """Yield the results of the merges of a token's characters, in the order of their ranks."""
    parts = list(token)
    while len(parts) > 1:
        rank, place = min((ranks.get(pair, len(ranks)), place) for place, pair in enumerate(pairwise(parts)))
        if rank == len(ranks):
            return
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        yield parts[place]


def _unigram(model: Mapping[str, Any], needed: list[str]) -> Iterator[str]:
    """Yield the pieces of Unigram to keep: needed ones, single characters and bytes, and the least probable piece.

    Pieces with a character that has no piece of its own are kept as well. The score of unknown characters is relative
    to that of the least probable piece.
    """
    pieces = {piece for piece, _ in model["vocab"]}
    yield from needed
    yield min(model["vocab"], key=lambda entry: entry[1])[0]
    if model["unk_id"] is not None:
        yield model["vocab"][model["unk_id"]][0]
    for piece in pieces:
        if len(piece) <= 1 or _BYTE.fullmatch(piece) or any(character not in pieces for character in piece):
            yield piece


def _unknown_token(model: Mapping[str, Any]) -> Iterator[str]:
    if model.get("unk_token") in model["vocab"]:
        yield model["unk_token"]


_CLOSURES: dict[str, Callable[[Mapping[str, Any], list[str]], Iterator[str]]] = {
    "BPE": _bpe,
    "WordPiece": _wordpiece,
    "Unigram": _unigram,
}
"""Kind of tokenizer -> function from required tokens to tokens to keep. Other kinds do not split words."""
