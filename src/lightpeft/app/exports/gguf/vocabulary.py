"""Write a tokenizer in llama.cpp's format: tokens with types, merges or scores, special tokens, pre-tokenizer.

Two kinds of BPE are supported: byte-level (GPT-2, Llama 3, Qwen2, SmolLM2), and SentencePiece with byte fallback
(Llama 2, Mistral, TinyLlama).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightpeft.errors import require

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BY_PATTERN = {
    rf"{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}": "llama-bpe",
    rf"{_WORDS}|\p{{N}}|{_OTHERS}": "qwen2",
}
"""Pattern that splits a text into words -> name of llama.cpp's pre-tokenizer."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""Token types in GGUF files."""
_SPACE = "\u2581"
"""Character for a space in SentencePiece's pieces."""
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
_PIECE_STEPS = {"Prepend", "Replace", "Metaspace"}
"""Tokenizer steps before BPE that only insert `_SPACE`."""


def add_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase, size: int, folder: Path) -> None:
    """Write a tokenizer into a GGUF file, with its chat template.

    Args:
        writer: a `gguf.GGUFWriter`.
        tokenizer: the tokenizer to write.
        size: rows of the model's embedding matrix; may exceed the number of tokens.
        folder: folder for temporary files.

    Raises:
        LightPeftError: the kind of tokenizer is not supported, or it has more tokens than the model.
    """
    from gguf import SpecialVocab

    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    require(file.is_file(), "the tokenizer has no tokenizer.json, which GGUF export needs; use a fast tokenizer")
    found = json.loads(file.read_text(encoding="utf-8"))
    pieces = found["model"]["type"] == "BPE" and bool(found["model"].get("byte_fallback"))
    if pieces:
        _check_pieces(found)
    model, words = ("llama", "default") if pieces else ("gpt2", pre_tokenizer_name(found))
    names, types = _tokens(found, size)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(words)
    if pieces:
        writer.add_token_scores(_scores(found, names))
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith(_SPACE))
    writer.add_token_list(names)
    writer.add_token_types(types)
    special = SpecialVocab(folder, load_merges=not pieces, n_vocab=size)
    special.add_special_token.pop("bos", None)  # the tokenizer's behavior counts, not its config
    special.add_to_gguf(writer)
    writer.add_add_bos_token(_adds_bos(tokenizer))


def _check_pieces(tokenizer: Mapping[str, Any]) -> None:
    """Raise `LightPeftError` if a SentencePiece tokenizer changes or splits texts before BPE."""
    steps = [step for name in ("normalizer", "pre_tokenizer") for step in _steps(tokenizer.get(name))]
    other = [step["type"] for step in steps if step["type"] not in _PIECE_STEPS]
    require(
        not other,
        f"the tokenizer changes texts ({', '.join(other)}), which llama.cpp does not support for SentencePiece; "
        "use form merged",
    )


def _steps(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return list(step.get("normalizers") or step.get("pretokenizers") or [step])


def _scores(tokenizer: Mapping[str, Any], names: list[str]) -> list[float]:
    """Return the scores by which llama.cpp merges, [tokens]: the earlier a merge, the higher its score."""
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in tokenizer["model"]["merges"]]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    return [-float(ranks.get(name, len(merges))) for name in names]


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the pre-tokenizer of a byte-level tokenizer.

    Args:
        tokenizer: content of tokenizer.json.

    Raises:
        LightPeftError: the tokenizer is not byte-level, or its pre-tokenizer is not supported.
    """
    kinds = "byte-level BPE (GPT-2, Llama 3, Qwen2, SmolLM2) or SentencePiece BPE (Llama 2, Mistral)"
    steps = _steps(tokenizer.get("pre_tokenizer"))
    bytewise = tokenizer["model"].get("type") == "BPE" and steps and steps[-1]["type"] == "ByteLevel"
    require(
        bytewise, f"GGUF export supports tokenizers with {kinds}; this tokenizer is of another kind; use form merged"
    )
    changing = [step["type"] for step in _steps(tokenizer.get("normalizer")) if step["type"] != "NFC"]
    changes = f"the tokenizer changes texts ({', '.join(changing)}), which llama.cpp does not support"
    require(not changing, f"{changes}; use form merged")
    *before, last = steps
    name = None
    if last.get("add_prefix_space"):
        pass  # no pre-tokenizer of llama.cpp puts a space before a text
    elif last.get("use_regex", True):
        name = {"": "gpt-2", "Digits": "smollm"}.get("".join(step["type"] for step in before))
        name = None if before and not before[0].get("individual_digits") else name
    elif len(before) == 1 and before[0].get("type") == "Split":
        name = _BY_PATTERN.get(before[0]["pattern"].get("Regex", ""))
    require(
        name is not None, "the tokenizer's pre-tokenizer is not known to be supported by llama.cpp; use form merged"
    )
    return str(name)


def _tokens(tokenizer: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    last = max([*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer.get("added_tokens", []))])
    rows = f"the tokenizer has a token {last}, and the model has rows for {size} tokens"
    require(last < size, f"{rows}; call model.resize_token_embeddings(len(tokenizer)) before training")
    names, types = [f"[PAD{number}]" for number in range(size)], [_UNUSED] * size
    fallback = bool(tokenizer["model"].get("byte_fallback"))
    for name, number in tokenizer["model"]["vocab"].items():
        names[number], types[number] = name, _BYTE if fallback and _BYTE_TOKEN.fullmatch(name) else _NORMAL
    for token in tokenizer.get("added_tokens", []):
        names[token["id"]], types[token["id"]] = token["content"], _CONTROL if token["special"] else _USER_DEFINED
    unknown = tokenizer["model"]["vocab"].get(tokenizer["model"].get("unk_token"))
    if fallback and unknown is not None:
        types[unknown] = _UNKNOWN
    return names, types


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the tokenizer adds its start token to every text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
