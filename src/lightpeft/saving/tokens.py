"""The kept tokens of a light model, as a small file, and the tokenizer for them.

The tokenizer is made on loading from the base's and the kept tokens. These are one bit each; a tokenizer file would be
larger than most adapters.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.config import ModelConfig
from lightpeft.errors import require
from lightpeft.files import explain_content_errors, read_tensors
from lightpeft.models.loading import load_model_config
from lightpeft.models.repositories import TOKENIZER, Token
from lightpeft.models.tokenizers import check_vocabulary, ensure_pad_token, load_tokenizer
from lightpeft.models.vocabulary.cutting import vocabulary_of
from lightpeft.models.vocabulary.kept import Vocabulary
from lightpeft.models.vocabulary.tokenizer import cut_tokenizer
from lightpeft.saving.description import BaseFacts

VOCABULARY_FILE = "vocabulary.safetensors"
"""File in a light adapter whose vocabulary was cut."""


def tokenizer_of(model: PreTrainedModel, saved: BaseFacts) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a light model's base, without cut tokens.

    Args:
        model: the pruned model, with or without PEFT merged into it.
        saved: description of its base.

    Raises:
        LightPeftError: the base is missing, or has no tokenizer.
    """
    place = saved.place()
    folder = Path(place.name).expanduser()
    if folder.is_dir() and place.gguf_file is None:  # without files, transformers would make a default tokenizer
        has_files = any(path.match(pattern) for path in folder.iterdir() for pattern in TOKENIZER)
        require(has_files, f"{folder} has no tokenizer files")
    tokenizer = tokenizer_over(place, vocabulary_of(model))
    check_vocabulary(tokenizer, model.config)
    return tokenizer


def write_vocabulary(vocabulary: Vocabulary, folder: Path) -> None:
    """Write the kept tokens, one bit per token of the base."""
    save_file({"kept": vocabulary.to_bits(), "size": torch.tensor([vocabulary.size])}, folder / VOCABULARY_FILE)


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """Read the kept tokens of a light adapter; None: all.

    Raises:
        LightPeftError: the file is damaged.
    """
    file = folder / VOCABULARY_FILE
    if not file.is_file():
        return None
    with explain_content_errors(file):
        tensors = read_tensors(file)
        (size,) = tensors["size"].tolist()
        return Vocabulary.from_bits(tensors["kept"], int(size))


def tokenizer_over(model: ModelConfig, vocabulary: Vocabulary | None, token: Token = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base, cut to the kept tokens, with a padding token.

    Args:
        model: name or folder of the base.
        vocabulary: kept tokens; None: all.
        token: access token for the hub; None: that of the logged-in account, if any.

    Raises:
        LightPeftError: the base is missing, or has another tokenizer.
    """
    tokenizer = load_tokenizer(model, token=token)
    ensure_pad_token(tokenizer, load_model_config(model, token))
    return tokenizer if vocabulary is None else cut_tokenizer(tokenizer, vocabulary)
