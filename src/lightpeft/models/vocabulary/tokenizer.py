"""Cutting of a tokenizer to some of its tokens, with new ids."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lightpeft.compat.transformers import with_backend
from lightpeft.errors import require
from lightpeft.files.foreign import parsing
from lightpeft.models.vocabulary.closure import describe, renumber, token_ids
from lightpeft.models.vocabulary.kept import Vocabulary


def cut_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> PreTrainedTokenizerBase:
    """Copy a tokenizer, and cut it to the tokens of a vocabulary.

    Args:
        tokenizer: tokenizer of the base, which does not change.
        vocabulary: tokens to keep, from `kept_tokens` of this tokenizer.

    Raises:
        LightPeftError: the tokenizer is no fast one of a known kind, or the vocabulary belongs to another one.
    """
    description = describe(tokenizer)
    new = vocabulary.new_ids
    tokens = {token: new[old] for token, old in token_ids(description).items() if old in new}
    other = f"this {type(tokenizer).__name__} is not the one whose tokens were selected; give the tokenizer of the base"
    require(len(set(tokens.values())) == len(vocabulary), other)
    _cut(description["model"], tokens)
    with parsing(other):
        renumber(description, new.__getitem__)
        backend = Tokenizer.from_str(json.dumps(description))
    require(all(backend.token_to_id(token) == number for token, number in tokens.items()), other)
    return with_backend(tokenizer, backend)


def _cut(model: dict[str, Any], tokens: dict[str, int]) -> None:
    """Cut the model of a tokenizer.json to these tokens, and to merges among them."""
    if model["type"] == "Unigram":
        if model["unk_id"] is not None:
            unknown = model["vocab"][model["unk_id"]][0]
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in tokens]
        if model["unk_id"] is not None:
            model["unk_id"] = tokens[unknown]
        return
    model["vocab"] = {token: tokens[token] for token in model["vocab"] if token in tokens}
    if "merges" in model:
        model["merges"] = [
            [left, right] for left, right in model["merges"] if {left, right, left + right} <= model["vocab"].keys()
        ]
