"""A tokenizer as llama.cpp wants it: tokens with their types, merges, special tokens, and how a text is split first."""

from __future__ import annotations

import json
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
_NORMAL, _CONTROL, _GIVEN, _UNUSED = 1, 3, 4, 5
"""Types of tokens in GGUF files."""


def add_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase, size: int, folder: Path) -> None:
    """Write a byte-level BPE tokenizer into a GGUF file, with its chat template.

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
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting(found))
    names, types = _tokens(found, size)
    writer.add_token_list(names)
    writer.add_token_types(types)
    special = SpecialVocab(folder, load_merges=True, n_vocab=size)
    special.add_special_token.pop("bos", None)  # what the tokenizer does counts, and not what its config says
    special.add_to_gguf(writer)
    writer.add_add_bos_token(_begins(tokenizer))


def splitting(tokenizer: Mapping[str, Any]) -> str:
    """What llama.cpp calls the way in which a byte-level tokenizer splits a text into words.

    Args:
        tokenizer: tokenizer.json.

    Raises:
        LightPeftError: it is of another kind, or splits in a way that has no name here.
    """
    kind = "a tokenizer of bytes (BPE, as of GPT-2, Llama 3, Qwen2 and SmolLM2)"
    model, first = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    bytewise = model.get("type") == "BPE" and not model.get("byte_fallback") and steps[-1].get("type") == "ByteLevel"
    require(bytewise, f"a GGUF file takes {kind}; this one is of another kind")
    *before, last = steps
    name = None
    if last.get("use_regex", True):
        name = {"": "gpt-2", "Digits": "smollm"}.get("".join(step["type"] for step in before))
        name = None if before and not before[0].get("individual_digits") else name
    elif len(before) == 1 and before[0].get("type") == "Split":
        name = _BY_PATTERN.get(before[0]["pattern"].get("Regex", ""))
    require(name is not None, "the tokenizer splits texts in a way for which llama.cpp has no name known here")
    return str(name)


def _tokens(tokenizer: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    names, types = [f"[PAD{number}]" for number in range(size)], [_UNUSED] * size
    for name, number in tokenizer["model"]["vocab"].items():
        names[number], types[number] = name, _NORMAL
    for token in tokenizer.get("added_tokens", []):
        names[token["id"]], types[token["id"]] = token["content"], _CONTROL if token["special"] else _GIVEN
    return names, types


def _begins(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether every text begins with a token of its own."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
