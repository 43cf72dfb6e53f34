"""From text to tokens: what every task shares about lengths, padding and encoded rows."""

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
"""Rows tokenised at a time."""
NO_LIMIT = 10**9
"""Tokenizers without a length limit report a number far above this."""
NOT_INPUTS = ("length", "group", "names", "right", "row", "begins", "ends", "null", "context")
"""Columns of encoded rows that no model takes: what batches are sorted by, and what answers are compared with."""
MOSTLY = 0.5
"""From this part on, unknown tokens are most of a row, and such rows most of the data."""


def check_max_length(max_length: int, positions: int | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `LightPeftError` if rows of `max_length` tokens are longer than the model or the tokenizer allows.

    Args:
        positions: tokens that the model's position table has room for; None: any number.
    """
    limits = [positions] if positions else []
    limits += [tokenizer.model_max_length] if tokenizer.model_max_length < NO_LIMIT else []
    longest = min(limits, default=max_length)
    require(
        max_length <= longest,
        f"data.max_length is {max_length}, but the model takes at most {longest} tokens; set it to {longest} or less",
    )


PADDED_TO = 8
"""Batches are padded to a multiple of so many tokens: few different shapes are faster than a few tokens less."""


def padding_within(max_length: int, positions: int | None) -> int | None:
    """What to pad batches to a multiple of: None where rows of `max_length` tokens would outgrow the model by that.

    Args:
        positions: tokens that the model's position table has room for; None: any number.
    """
    fits = positions is None or math.ceil(max_length / PADDED_TO) * PADDED_TO <= positions
    return PADDED_TO if fits else None


def check_tokens(
    encoded: Dataset, model_config: PretrainedConfig, what: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Refuse encoded rows that the model cannot read: another tokenizer's, or in another script.

    Args:
        encoded: with input_ids; of several options, as lists.
        what: names the rows in error lines.
        tokenizer: that encoded them; None: unknown tokens are not counted.

    Raises:
        LightPeftError: a token has no embedding, or most rows are mostly unknown tokens.
    """
    embeddings, unread = embeddings_of(model_config), 0
    for ids in _token_lists(encoded):
        highest = max(ids, default=0)
        require(
            embeddings is None or highest < embeddings,
            f"{what}: the tokenizer gives token {highest}, and the model has embeddings of tokens 0 to "
            f"{(embeddings or 0) - 1}; put the tokenizer that belongs to it into its folder",
        )
        unread += tokenizer is not None and _mostly_unknown(ids, tokenizer)
    require(
        unread <= MOSTLY * len(encoded),
        f"{what}: {unread} of {len(encoded)} rows are mostly tokens that the tokenizer does not know; "
        "give a model whose vocabulary fits these texts, or its own tokenizer",
    )


def _mostly_unknown(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether most of a row's tokens, special ones apart, stand for what is not in the vocabulary.

    Tokenizers by bytes know everything, and call the end of a text unknown.
    """
    unknown = tokenizer.unk_token_id
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id)
    if unknown is None or unknown in others or unknown not in ids:
        return False
    special = set(tokenizer.all_special_ids) - {unknown}
    return ids.count(unknown) > MOSTLY * sum(token not in special for token in ids)


def _token_lists(encoded: Dataset) -> Iterator[list[int]]:
    """Every row's tokens; those of several options one behind the other."""
    for chunk in encoded.select_columns("input_ids").iter(ENCODE_ROWS):
        for ids in chunk["input_ids"]:
            yield [token for option in ids for token in option] if ids and isinstance(ids[0], list) else ids


def share_at_limit(encoded: Dataset, max_length: int) -> float:
    """Part of the encoded rows that fill all of `max_length` tokens (multiple choice: with an option), in [0, 1].

    Nearly all of them were cut.
    """
    longest = [max(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids) for ids in encoded["input_ids"][:]]
    return sum(length >= max_length for length in longest) / max(len(longest), 1)


def in_chunks(
    rows: Dataset,
    encode: Callable[[dict[str, list[Any]], int], dict[str, list[Any]]],
    length: Callable[[Any], int] = len,
) -> Dataset:
    """Encoded rows: `encode(columns of a chunk, index of its first row)` over chunks, plus each row's `length`.

    `length` says what a row's input_ids cost in a batch: their number, where they are one sequence. Unlike
    `Dataset.map` this hashes no tokenizer and writes no cache file.
    """
    chunks = []
    starts = range(0, len(rows), ENCODE_ROWS)
    for start in bars.progress(starts, len(starts), "Tokenizing"):
        encoded = encode(rows[start : start + ENCODE_ROWS], start)
        chunks.append(Dataset.from_dict({**encoded, "length": [length(ids) for ids in encoded["input_ids"]]}))
    return concatenate_datasets(chunks)


def take_rows(rows: Dataset, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Some rows, in that order, read at once."""
    columns = rows[list(numbers)]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@dataclass
class Collator:
    """Makes batches of encoded rows: keeps what a model takes (not `NOT_INPUTS`) and pads to the longest row."""

    pad: Callable[[list[dict[str, Any]]], dict[str, Any]]
    tokenizer: PreTrainedTokenizerBase | None = None
    """For tasks whose answers are texts that the model writes."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Tensors [rows, longest row]; for classification, labels [rows]."""
        return dict(self.pad([{name: row[name] for name in row if name not in NOT_INPUTS} for row in rows]))
