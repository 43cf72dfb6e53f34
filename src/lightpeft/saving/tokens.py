"""The tokens of a light model: which of its base's it has, as a small file, and the tokenizer that follows from them.

The tokenizer is made anew from the base's when it is asked for: it follows from that and from the tokens that stay,
which are a bit each, while its own file would be larger than most adapters.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.config import ModelConfig
from lightpeft.errors import require
from lightpeft.files import explain_content_errors, read_tensors
from lightpeft.models.loading import load_model_config, load_tokenizer
from lightpeft.models.repositories import TOKENIZER
from lightpeft.models.tokenizers import check_vocabulary, ensure_pad_token
from lightpeft.models.vocabulary.cutting import vocabulary_of
from lightpeft.models.vocabulary.kept import Vocabulary
from lightpeft.models.vocabulary.tokenizer import cut_tokenizer
from lightpeft.saving.description import BaseFacts

VOCABULARY_FILE = "vocabulary.safetensors"
"""In the folder of a light adapter that has not all tokens of its base."""


def tokenizer_of(model: PreTrainedModel, saved: BaseFacts) -> PreTrainedTokenizerBase:
    """The tokenizer of the base that a light model was made from, with the tokens that are left to it.

    Args:
        model: the pruned model, with PEFT merged into it or not.
        saved: its base.

    Raises:
        LightPeftError: the base is not where it was, or has no tokenizer.
    """
    place = saved.place()
    folder = Path(place.name).expanduser()
    if folder.is_dir() and place.gguf_file is None:  # transformers makes one up where there are no files
        has_files = any(path.match(pattern) for path in folder.iterdir() for pattern in TOKENIZER)
        require(has_files, f"{folder} has no files of one")
    tokenizer = tokenizer_over(place, vocabulary_of(model))
    check_vocabulary(tokenizer, model.config)
    return tokenizer


def write_vocabulary(vocabulary: Vocabulary, folder: Path) -> None:
    """Write which tokens stay: a bit each."""
    save_file({"kept": vocabulary.to_bits(), "size": torch.tensor([vocabulary.size])}, folder / VOCABULARY_FILE)


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The tokens of a light adapter whose files were checked; None: all of its base's.

    Raises:
        LightPeftError: the file holds something else.
    """
    file = folder / VOCABULARY_FILE
    if not file.is_file():
        return None
    with explain_content_errors(file):
        tensors = read_tensors(file)
        (size,) = tensors["size"].tolist()
        return Vocabulary.from_bits(tensors["kept"], int(size))


def tokenizer_over(model: ModelConfig, vocabulary: Vocabulary | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a base, or of one with these tokens alone, with a token to pad with.

    Raises:
        LightPeftError: the base is not there, or has another tokenizer.
    """
    tokenizer = load_tokenizer(model)
    ensure_pad_token(tokenizer, load_model_config(model))
    return tokenizer if vocabulary is None else cut_tokenizer(tokenizer, vocabulary)
