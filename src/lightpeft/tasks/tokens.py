"""From text to tokens: what every task shares about lengths, padding and encoded rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from datasets import Dataset, concatenate_datasets
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lightpeft.errors import require
from lightpeft.tasks.progress import Progress

T = TypeVar("T")

ENCODE_ROWS = 1000
"""Rows tokenised at a time."""
NO_LIMIT = 10**9
"""Tokenizers without a length limit report a number far above this."""
IGNORED = -100
"""Label of positions that count in no loss."""
SPAN_LABELS = ("start_positions", "end_positions")
"""Labels of an answer's first and last token."""
LABELS = ("labels", *SPAN_LABELS)
"""What a batch has for the loss alone."""
NOT_INPUTS = ("length", "group", "names", "right")
"""Columns of encoded rows that no model takes: what batches are sorted by, and what answers are compared with."""


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


def share_at_limit(encoded: Dataset, max_length: int) -> float:
    """Part of the encoded rows that fill all of `max_length` tokens (multiple choice: with an option), in [0, 1].

    Nearly all of them were cut.
    """
    longest = [max(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids) for ids in encoded["input_ids"][:]]
    return sum(length >= max_length for length in longest) / max(len(longest), 1)


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
    """Give tokenizer and model config one padding token; a decoder without one pads with its end token.

    Padded positions have attention 0 and no label, so the choice changes no result. `*ForSequenceClassification`
    decoders find the last real token by `pad_token_id`, hence both sides must agree.

    Raises:
        LightPeftError: the tokenizer has neither a usable padding token nor an end token.
    """
    config = model_config.get_text_config()
    pad, vocabulary = tokenizer.pad_token_id, getattr(config, "vocab_size", None)
    # A padding token that was added to the tokenizer only has no row in the embedding.
    if pad is None or (vocabulary is not None and pad >= vocabulary):
        require(tokenizer.eos_token is not None, "the tokenizer has no padding token and no end token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id


def in_chunks(
    rows: Dataset,
    encode: Callable[[dict[str, list[Any]], int], dict[str, list[Any]]],
    progress: Progress,
    length: Callable[[Any], int] = len,
) -> Dataset:
    """Encoded rows: `encode(columns of a chunk, index of its first row)` over chunks, plus each row's `length`.

    `length` says what a row's input_ids cost in a batch: their number, where they are one sequence. Unlike
    `Dataset.map` this hashes no tokenizer and writes no cache file.
    """
    chunks = []
    starts = range(0, len(rows), ENCODE_ROWS)
    for start in progress(starts, len(starts), "Tokenizing"):
        encoded = encode(rows[start : start + ENCODE_ROWS], start)
        chunks.append(Dataset.from_dict({**encoded, "length": [length(ids) for ids in encoded["input_ids"]]}))
    return concatenate_datasets(chunks)


def without_labels(batch: Mapping[str, T]) -> dict[str, T]:
    """What a model needs to answer."""
    return {name: values for name, values in batch.items() if name not in LABELS}


@dataclass
class Collator:
    """Makes batches of encoded rows: keeps what a model takes (not `NOT_INPUTS`) and pads to the longest row."""

    pad: Callable[[list[dict[str, Any]]], dict[str, Any]]
    tokenizer: PreTrainedTokenizerBase | None = None
    """For tasks whose answers are texts that the model writes."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Tensors [rows, longest row]; for classification, labels [rows]."""
        return dict(self.pad([{name: row[name] for name in row if name not in NOT_INPUTS} for row in rows]))
