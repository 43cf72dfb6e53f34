"""Which tokens stay: those that are asked for, and with them what lets every text still be tokenised.

Texts whose tokens all stay are tokenised as before, because nothing that stays ranks otherwise among what stays: the
longest match (WordPiece), the first merge (BPE) and the best path (Unigram) are what they were. All others come in more
pieces, down to single characters or bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightpeft.errors import require

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A piece that stands for one byte of a character without a piece of its own."""


def kept_tokens(tokenizer: PreTrainedTokenizerBase, needed: Iterable[int]) -> tuple[int, ...]:
    """Ids of the tokens that stay where these are needed, ascending.

    Besides them stay: special and added tokens; single characters and bytes; of BPE, the tokens on the way of merges
    to one that stays; and what the model falls back on where a character is in no piece alone.

    Raises:
        LightPeftError: the tokenizer is not a fast one, or of a kind whose words have no parts.
    """
    description = describe(tokenizer)
    model, ids = description["model"], token_ids(description)
    known = {number: token for token, number in ids.items()}
    fixed = {*_added(description), *tokenizer.all_special_ids} & known.keys()
    of_parts = _KINDS[model["type"]](model, [known[number] for number in set(needed) & known.keys() - fixed])
    return tuple(sorted(fixed | {ids[token] for token in of_parts} | (set(needed) & known.keys())))


def describe(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A fast tokenizer as its tokenizer.json has it.

    Raises:
        LightPeftError: it is not a fast one, or of a kind whose vocabulary cannot be cut.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    instead = "keep all its tokens (of a run, light.remove.vocabulary: keep)"
    name = type(tokenizer).__name__
    require(backend is not None, f"{name} is no fast tokenizer, whose vocabulary could be cut; {instead}")
    description: dict[str, Any] = json.loads(backend.to_str())
    model = description["model"]
    known = " and ".join([", ".join([*_KINDS][:-1]), [*_KINDS][-1]])
    cuttable = f"the vocabulary of {name} cannot be cut: it is of kind {model['type']}, and those that can are {known}"
    require(model["type"] in _KINDS, f"{cuttable}; {instead}")
    marked = model.get("end_of_word_suffix") or (model["type"] == "BPE" and model.get("continuing_subword_prefix"))
    require(not marked, f"the vocabulary of {name} cannot be cut: its BPE marks parts of words ({marked}); {instead}")
    return description


def token_ids(description: Mapping[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json, added ones included, with its id."""
    vocabulary = description["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in description["added_tokens"]}}


def renumber(description: Mapping[str, Any], number: Callable[[int], int]) -> None:
    """Give every id of a tokenizer.json outside its model another number, in place.

    Raises:
        LightPeftError: what is put around texts is of a kind that is not known here.
    """
    for token in description["added_tokens"]:
        token["id"] = number(token["id"])
    if description.get("padding"):
        description["padding"]["pad_id"] = number(description["padding"]["pad_id"])
    for step in _steps(description.get("post_processor")):
        kind = step["type"]
        require(kind in _AROUND, f"the vocabulary cannot be cut: a tokenizer with {kind} is not known here")
        _AROUND[kind](step, number)


def _steps(processor: Mapping[str, Any] | None) -> Iterator[Any]:
    if processor is not None and processor["type"] == "Sequence":
        for step in processor["processors"]:
            yield from _steps(step)
    elif processor is not None:
        yield processor


def _of_template(step: Mapping[str, Any], number: Callable[[int], int]) -> None:
    for token in step["special_tokens"].values():
        token["ids"] = [number(each) for each in token["ids"]]


def _of_pair(step: dict[str, Any], number: Callable[[int], int]) -> None:
    for name in ("sep", "cls"):
        token, old = step[name]
        step[name] = [token, number(old)]


_AROUND: dict[str, Callable[[Any, Callable[[int], int]], None]] = {
    "TemplateProcessing": _of_template,
    "BertProcessing": _of_pair,
    "RobertaProcessing": _of_pair,
    "ByteLevel": lambda step, number: None,
}
"""What is put around texts -> how the ids in it are changed."""


def _added(description: Mapping[str, Any]) -> set[int]:
    """Ids of added tokens, and of those that are put around texts or fill batches."""
    found: set[int] = set()

    def note(number: int) -> int:
        found.add(number)
        return number

    renumber(description, note)
    return found


def _wordpiece(model: Mapping[str, Any], needed: list[str]) -> Iterator[str]:
    """Single characters, in both their forms. A word that has a character without one keeps its tokens whole."""
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
    """Single characters and bytes, and for every token what merges make on the way to it."""
    ranks = {tuple(merge): rank for rank, merge in reversed(list(enumerate(model["merges"])))}
    yield from _unknown(model)
    yield from (token for token in model["vocab"] if len(token) == 1 or _BYTE.fullmatch(token))
    for token in needed:
        yield token
        yield from () if _BYTE.fullmatch(token) else _merged(token, ranks)


def _merged(token: str, ranks: Mapping[tuple[str, ...], int]) -> Iterator[str]:
    """What merges make of the characters of a token, one after another, the first in rank first."""
    parts = list(token)
    while len(parts) > 1:
        rank, place = min((ranks.get(pair, len(ranks)), place) for place, pair in enumerate(pairwise(parts)))
        if rank == len(ranks):
            return
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        yield parts[place]


def _unigram(model: Mapping[str, Any], needed: list[str]) -> Iterator[str]:
    """Single characters and bytes, pieces with a character that has no piece alone, and the least probable piece.

    The score of what is unknown is counted from the last one's.
    """
    pieces = {piece for piece, _ in model["vocab"]}
    yield from needed
    yield min(model["vocab"], key=lambda entry: entry[1])[0]
    if model["unk_id"] is not None:
        yield model["vocab"][model["unk_id"]][0]
    for piece in pieces:
        if len(piece) <= 1 or _BYTE.fullmatch(piece) or any(character not in pieces for character in piece):
            yield piece


def _unknown(model: Mapping[str, Any]) -> Iterator[str]:
    if model.get("unk_token") in model["vocab"]:
        yield model["unk_token"]


_KINDS: dict[str, Callable[[Mapping[str, Any], list[str]], Iterator[str]]] = {
    "BPE": _bpe,
    "WordPiece": _wordpiece,
    "Unigram": _unigram,
}
"""Kind of tokenizer -> the tokens that stay where some are needed. Words of others have no parts to fall back on."""
