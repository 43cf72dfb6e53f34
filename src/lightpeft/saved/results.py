"""What training leaves in a run's folder: an adapter, or a whole model."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.files import check_sealed, replacing_folder, seal
from lightpeft.saved.light_adapter import LightModel
from lightpeft.saved.peft_adapter import load_adapter, read_adapter


def save_peft(model: PeftModel, folder: Path) -> None:
    """Write a light adapter, or an adapter as PEFT writes it: whole or not at all."""
    if isinstance(model, LightModel):
        model.save_pretrained(folder)
        return
    with replacing_folder(folder) as temporary:
        model.save_pretrained(str(temporary))
        seal(temporary)


def save_dense(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a whole transformers model with its tokenizer: whole or not at all."""
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        seal(temporary)


def load_peft(base: PreTrainedModel, folder: Path, is_trainable: bool = False) -> PeftModel:
    """What `save_peft` wrote of plain PEFT.

    Raises:
        LightPeftError: a file is missing or altered, or the adapter does not fit.
    """
    check_sealed(folder)
    return load_adapter(base, folder, read_adapter(folder), is_trainable)
