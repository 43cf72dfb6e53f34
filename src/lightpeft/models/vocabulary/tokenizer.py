"""A tokenizer with some of its tokens alone, renumbered: in all else the one that it was."""

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
    """A copy that knows the tokens of a vocabulary alone.

    Args:
        tokenizer: of the base; stays as it is.
        vocabulary: from `kept_tokens` of this tokenizer.

    Raises:
        LightPeftError: it is not a fast tokenizer of a known kind, or not the one that the vocabulary is of.
    """
    description = describe(tokenizer)
    new = vocabulary.new_ids
    tokens = {token: new[old] for token, old in token_ids(description).items() if old in new}
    other = f"{type(tokenizer).__name__} is not the tokenizer whose tokens were chosen: give the one of the base"
    require(len(set(tokens.values())) == len(vocabulary), other)
    _cut(description["model"], tokens)
    with parsing(other):
        renumber(description, new.__getitem__)
        backend = Tokenizer.from_str(json.dumps(description))
    require(all(backend.token_to_id(token) == number for token, number in tokens.items()), other)
    return with_backend(tokenizer, backend)


def _cut(model: dict[str, Any], tokens: dict[str, int]) -> None:
    """Leave these tokens in a tokenizer.json's model, and the merges of these into these."""
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
