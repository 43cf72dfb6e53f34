"""Write light models as GGUF files, for llama.cpp and programs that use it."""

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

GGUF_FILE = "model.gguf"


@dataclass(frozen=True)
class GgufFile:
    """A written GGUF file."""

    path: Path
    matrices: dict[str, int]
    """GGUF data type -> number of matrices written in it."""


def save_gguf(
    model: Described,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: GgufType = "auto",
    overwrite: bool = False,
) -> GgufFile:
    """Write a merged copy of a light model as `model.gguf`, with its tokenizer and chat template (see `export_model`).

    Supported are causal language models of the families Llama (also SmolLM2), Mistral, Qwen2 and Qwen3. Heads, KV heads
    and neurons may differ from layer to layer; the first block needs attention. With dtype `q8_0`, matrices whose rows
    are no multiple of 32 are written in `f16` (`light.remove.multiple_of: 32` avoids this).
    """
    folder = Path(folder)
    check_vacant(folder, replaceable=(folder / GGUF_FILE).is_file(), overwrite=overwrite)
    check_family(transformers_model(cast(PeftModel, model)))  # before it is copied
    whole = merged_copy(model)
    with replacing_folder(folder, last=GGUF_FILE, alone=True) as temporary:
        matrices = write_gguf(whole, model.light_plan, tokenizer, temporary / GGUF_FILE, dtype)
        form = whole_model_form(
            model.light_plan, f"llama-cli -m {GGUF_FILE}", " as a GGUF file", language="", library="gguf"
        )
        card = model_card(facts_of(model), model.light_plan, form)
        (temporary / CARD).write_text(card, encoding="utf-8")
    return GgufFile(folder / GGUF_FILE, matrices)
