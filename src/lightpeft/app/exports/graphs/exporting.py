"""Write light models as graphs for ONNX Runtime and OpenVINO."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.adapters.merging import merged_copy
from lightpeft.app.exports.graphs.runtimes import Runtime
from lightpeft.app.exports.graphs.tracing import check_traceable, make_traceable, trace_inputs
from lightpeft.files import check_vacant, replacing_folder
from lightpeft.models.unwrap import transformers_model
from lightpeft.saving.cards import CARD, model_card, whole_model_form
from lightpeft.saving.description import Described, facts_of


def save_graph(
    model: Described,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    runtime: Runtime,
    *,
    dtype: str = "f32",
    overwrite: bool = False,
) -> None:
    """Write a light model with merged PEFT weights as a graph, with tokenizer and config.

    Layers may differ in width, and batch size and length are dynamic. The graph of a causal language model has a KV
    cache, and reads prompts as well. `export.json` is transformers' manifest, by which its `ExportedModel` loads the
    folder.

    Args:
        model: a `LightModel`. It does not change: a copy is merged, which takes the memory of the model once more.
        folder: a new or empty folder.
        tokenizer: tokenizer that determines the inputs; None: token ids and attention mask.
        runtime: the runtime to write for, one of `RUNTIMES`.
        dtype: data type of weights, a key of `runtime.writers`.
        overwrite: True to replace an earlier graph in the folder, with all files there.

    Raises:
        LightPeftError: a package is not installed, the model cannot be traced or merged, or the folder cannot be
            written. Nothing is half-written.
    """
    folder = Path(folder)
    runtime.check(dtype)
    check_vacant(folder, replaceable=(folder / runtime.file).is_file(), overwrite=overwrite)
    check_traceable(transformers_model(cast(PeftModel, model)))  # before it is copied
    whole = make_traceable(merged_copy(model))
    with replacing_folder(folder, last=runtime.file, alone=True) as temporary:
        write_graph(whole, tokenizer, runtime, temporary, dtype)
        (temporary / CARD).write_text(_card(model, runtime), encoding="utf-8")


def write_graph(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, runtime: Runtime, folder: Path, dtype: str
) -> None:
    """Write graph, manifest, config and tokenizer of a model, pruned or not.

    Args:
        model: the result of `make_traceable`.
        folder: a temporary folder.

    Raises:
        LightPeftError: a package is not installed, or the model cannot be traced.
    """
    runtime.write(model, trace_inputs(model, tokenizer), folder, dtype)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _card(model: Described, runtime: Runtime) -> str:
    plan, graph = model.light_plan, f" as a graph of {runtime.title}"
    form = whole_model_form(plan, runtime.use, graph, library=runtime.tool)
    return model_card(facts_of(model), plan, form)
