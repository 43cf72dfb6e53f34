"""Light models as GGUF files, which llama.cpp and all that is built on it serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lightpeft.adapters.merging import merged_copy
from lightpeft.app.exports.gguf.architectures import check_family
from lightpeft.app.exports.gguf.writing import GgufType, write_gguf
from lightpeft.files import check_vacant, replacing_folder
from lightpeft.models.unwrap import transformers_model
from lightpeft.saving.cards import CARD, model_card, whole_model_form
from lightpeft.saving.description import Described, facts_of

FILE = "model.gguf"


@dataclass(frozen=True)
class GgufFile:
    """A file that was written."""

    path: Path
    matrices: dict[str, int]
    """How many were written as what."""


def save_gguf(
    model: Described,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: GgufType = "auto",
    overwrite: bool = False,
) -> GgufFile:
    """Write a light model, PEFT merged into it, as `model.gguf` with its tokenizer and chat template, for llama.cpp.

    Models of Llama, Mistral, Qwen2 and Qwen3 (and what is built like them, such as SmolLM2) that write. Heads, KV heads
    and neurons may differ from layer to layer; the first block needs attention.

    Args:
        model: a `LightModel`; it stays as it is, and a copy of it is merged, which takes its memory once more.
        folder: new or empty.
        dtype: of matrices; "auto": as they are. Where rows are no multiple of 32, `q8_0` leaves matrices in `f16`
            (`light.remove.multiple_of: 32` makes them so).
        overwrite: the folder may also hold such a file, which goes with all that is in it.

    Raises:
        LightPeftError: `gguf` is not installed; llama.cpp has no place for this model or its tokenizer; or the
            folder cannot be written. Nothing is half-written.
    """
    folder = Path(folder)
    check_vacant(folder, replaceable=(folder / FILE).is_file(), overwrite=overwrite)
    check_family(transformers_model(cast(PeftModel, model)))  # before it is copied
    whole = merged_copy(model)
    with replacing_folder(folder, last=FILE, alone=True) as temporary:
        matrices = write_gguf(whole, model.light_plan, tokenizer, temporary / FILE, dtype)
        form = whole_model_form(
            model.light_plan, f"llama-cli -m {FILE}", " as a GGUF file", language="", library="gguf"
        )
        card = model_card(facts_of(model), model.light_plan, form)
        (temporary / CARD).write_text(card, encoding="utf-8")
    return GgufFile(folder / FILE, matrices)
