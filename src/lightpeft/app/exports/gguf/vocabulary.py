"""A tokenizer as llama.cpp wants it: tokens with types, merges or scores, special tokens, and how a text is split.

Two kinds of BPE: of bytes (GPT-2, Llama 3, Qwen2, SmolLM2), and of SentencePiece's pieces, with bytes for what is in no
piece (Llama 2, Mistral, TinyLlama).
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
"""Pattern that splits a text -> what llama.cpp calls it."""
_NORMAL, _UNKNOWN, _CONTROL, _GIVEN, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens in GGUF files."""
_SPACE = "\u2581"
"""What stands for a space in a piece."""
_A_BYTE = re.compile("<0x[0-9A-F]{2}>")
_OF_PIECES = {"Prepend", "Replace", "Metaspace"}
"""Steps before BPE that only put `_SPACE` in its places."""


def add_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase, size: int, folder: Path) -> None:
    """Write a tokenizer into a GGUF file, with its chat template.

    Args:
        writer: a `gguf.GGUFWriter`.
        size: of the model's vocabulary, which may have more rows than there are tokens.
        folder: of temporary files.

    Raises:
        LightPeftError: the tokenizer is of a kind that is not written here.
    """
    from gguf import SpecialVocab

    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    require(file.is_file(), "the tokenizer has no tokenizer.json, which a GGUF file is made from")
    found = json.loads(file.read_text(encoding="utf-8"))
    pieces = bool(found["model"].get("byte_fallback"))
    names, types = _tokens(found, size)
    if pieces:
        _check_pieces(found)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(found, names))
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith(_SPACE))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splitting(found))
    writer.add_token_list(names)
    writer.add_token_types(types)
    special = SpecialVocab(folder, load_merges=not pieces, n_vocab=size)
    special.add_special_token.pop("bos", None)  # what the tokenizer does counts, and not what its config says
    special.add_to_gguf(writer)
    writer.add_add_bos_token(_begins(tokenizer))


def _check_pieces(tokenizer: Mapping[str, Any]) -> None:
    """Refuse a tokenizer of pieces that changes texts, or splits them, before pieces are looked for."""
    steps = [step for name in ("normalizer", "pre_tokenizer") for step in _steps(tokenizer.get(name))]
    other = [step["type"] for step in steps if step["type"] not in _OF_PIECES]
    require(not other, f"the tokenizer changes texts ({', '.join(other)}) in a way that llama.cpp does not for pieces")


def _steps(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return list(step.get("normalizers") or step.get("pretokenizers") or [step])


def _scores(tokenizer: Mapping[str, Any], names: list[str]) -> list[float]:
    """What llama.cpp merges by: the earlier a piece is merged the higher, [tokens]."""
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in tokenizer["model"]["merges"]]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    return [-float(ranks.get(name, len(merges))) for name in names]


def splitting(tokenizer: Mapping[str, Any]) -> str:
    """What llama.cpp calls the way in which a byte-level tokenizer splits a text into words.

    Args:
        tokenizer: tokenizer.json.

    Raises:
        LightPeftError: it is of another kind, or splits in a way that has no name here.
    """
    kinds = "BPE of bytes (as of GPT-2, Llama 3, Qwen2 and SmolLM2) or of SentencePiece's pieces (Llama 2, Mistral)"
    steps = _steps(tokenizer.get("pre_tokenizer"))
    bytewise = tokenizer["model"].get("type") == "BPE" and steps and steps[-1]["type"] == "ByteLevel"
    require(bytewise, f"a GGUF file takes tokenizers of {kinds}; this one is of another kind")
    changing = [step["type"] for step in _steps(tokenizer.get("normalizer")) if step["type"] != "NFC"]
    require(not changing, f"the tokenizer changes texts ({', '.join(changing)}), which llama.cpp does not for bytes")
    *before, last = steps
    name = None
    if last.get("add_prefix_space"):
        pass  # no split of llama.cpp puts a space before a text
    elif last.get("use_regex", True):
        name = {"": "gpt-2", "Digits": "smollm"}.get("".join(step["type"] for step in before))
        name = None if before and not before[0].get("individual_digits") else name
    elif len(before) == 1 and before[0].get("type") == "Split":
        name = _BY_PATTERN.get(before[0]["pattern"].get("Regex", ""))
    require(name is not None, "the tokenizer splits texts in a way for which llama.cpp has no name known here")
    return str(name)


def _tokens(tokenizer: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    names, types = [f"[PAD{number}]" for number in range(size)], [_UNUSED] * size
    fallback = bool(tokenizer["model"].get("byte_fallback"))
    for name, number in tokenizer["model"]["vocab"].items():
        names[number], types[number] = name, _BYTE if fallback and _A_BYTE.fullmatch(name) else _NORMAL
    for token in tokenizer.get("added_tokens", []):
        names[token["id"]], types[token["id"]] = token["content"], _CONTROL if token["special"] else _GIVEN
    unknown = tokenizer["model"]["vocab"].get(tokenizer["model"].get("unk_token"))
    if fallback and unknown is not None:
        types[unknown] = _UNKNOWN
    return names, types


def _begins(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether every text begins with a token of its own."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
