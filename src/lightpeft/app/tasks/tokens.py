"""Token lengths, padding, and encoded rows: helpers of every task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lightpeft.console import bars
from lightpeft.errors import require
from lightpeft.models.tokenizers import embeddings_of

ENCODE_ROWS = 1000
"""Rows that are tokenized at once."""
NO_LIMIT = 10**9
"""Tokenizers without a length limit report a `model_max_length` far above this."""
NOT_INPUTS = ("length", "prompt", "group", "names", "right", "row", "begins", "ends", "null", "context")
"""Columns of encoded rows that are not model inputs: batches are sorted by them, or answers compared with them."""
UNKNOWN_SHARE = 0.5
"""Share in [0, 1]; above it, a row is mostly unknown tokens, or the data are mostly such rows."""


def check_max_length(max_length: int, positions: int | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `LightPeftError` if rows of `max_length` tokens are longer than the model or the tokenizer allows.

    Args:
        positions: size of the model's position table, in tokens; None: no limit.
    """
    limits = [positions] if positions else []
    limits += [tokenizer.model_max_length] if tokenizer.model_max_length < NO_LIMIT else []
    longest = min(limits, default=max_length)
    require(
        max_length <= longest,
        f"data.max_length is {max_length}, but the model takes at most {longest} tokens; set it to {longest} or less",
    )


PADDED_TO = 8
"""Batches are padded to a multiple of this many tokens: fewer distinct shapes save more time than fewer tokens."""


def padding_within(max_length: int, positions: int | None) -> int | None:
    """Return `PADDED_TO`, or None if padding rows of `max_length` tokens to it would exceed the model's positions.

    Args:
        positions: size of the model's position table, in tokens; None: no limit.
    """
    fits = positions is None or math.ceil(max_length / PADDED_TO) * PADDED_TO <= positions
    return PADDED_TO if fits else None


def check_tokens(
    encoded: Dataset, model_config: PretrainedConfig, what: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Raise `LightPeftError` if encoded rows do not fit the model's vocabulary.

    Args:
        encoded: rows with `input_ids`: a list of tokens, or for several options a list of lists.
        what: names the rows in error messages.
        tokenizer: the tokenizer that encoded them; None: unknown tokens are not counted.

    Raises:
        LightPeftError: a token has no embedding, or most rows are mostly unknown tokens.
    """
    embeddings, unread = embeddings_of(model_config), 0
    for ids in _token_lists(encoded):
        highest = max(ids, default=0)
        require(
            embeddings is None or highest < embeddings,
            f"{what}: the tokenizer gives token id {highest}, but the model has embeddings for ids 0 to "
            f"{(embeddings or 0) - 1}; put the model's own tokenizer into its folder",
        )
        unread += tokenizer is not None and _mostly_unknown(ids, tokenizer)
    require(
        unread <= UNKNOWN_SHARE * len(encoded),
        f"{what}: {unread} of {len(encoded)} rows are mostly unknown tokens; "
        "use a model whose vocabulary covers these texts, or its own tokenizer",
    )


def _mostly_unknown(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if most tokens of a row, special ones apart, are the unknown token.

    Byte-level tokenizers know every text, and some use their end token as the unknown token: they give False.
    """
    unknown = tokenizer.unk_token_id
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id)
    if unknown is None or unknown in others or unknown not in ids:
        return False
    special = set(tokenizer.all_special_ids) - {unknown}
    return ids.count(unknown) > UNKNOWN_SHARE * sum(token not in special for token in ids)


def _token_lists(encoded: Dataset) -> Iterator[list[int]]:
    """Yield the token ids of every row; those of several options are concatenated."""
    for chunk in encoded.select_columns("input_ids").iter(ENCODE_ROWS):
        for ids in chunk["input_ids"]:
            yield [token for option in ids for token in option] if ids and isinstance(ids[0], list) else ids


def share_at_limit(encoded: Dataset, max_length: int) -> float:
    """Return the share of encoded rows with `max_length` tokens (multiple choice: in one option), in [0, 1].

    Nearly all of these rows were truncated.
    """
    longest = [max(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids) for ids in encoded["input_ids"][:]]
    return sum(length >= max_length for length in longest) / max(len(longest), 1)


def in_chunks(
    rows: Dataset,
    encode: Callable[[dict[str, list[Any]], int], dict[str, list[Any]]],
    length: Callable[[Any], int] = len,
) -> Dataset:
    """Encode rows in chunks, and add each row's `length`.

    Unlike `Dataset.map` this hashes no tokenizer and writes no cache file.

    Args:
        encode: called with the columns of a chunk and the index of its first row.
        length: called with a row's input_ids; returns its cost in a batch, in tokens.
    """
    chunks = []
    starts = range(0, len(rows), ENCODE_ROWS)
    for start in bars.progress(starts, len(starts), "Tokenizing"):
        encoded = encode(rows[start : start + ENCODE_ROWS], start)
        chunks.append(Dataset.from_dict({**encoded, "length": [length(ids) for ids in encoded["input_ids"]]}))
    return concatenate_datasets(chunks)


def take_rows(rows: Dataset, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Return the rows at `numbers` as dicts, in that order, with one read."""
    columns = rows[list(numbers)]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@dataclass
class Collator:
    """Collate encoded rows into a batch: drop the columns in `NOT_INPUTS` and pad to the longest row."""

    pad: Callable[[list[dict[str, Any]]], dict[str, Any]]
    tokenizer: PreTrainedTokenizerBase | None = None
    """Tokenizer for tasks whose answers are generated texts; None for all others."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return tensors [rows, longest row]; for classification also labels [rows]."""
        return dict(self.pad([{name: row[name] for name in row if name not in NOT_INPUTS} for row in rows]))
