"""Light models as files that ONNX Runtime and OpenVINO run."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.adapters.merging import merged_copy
from lightpeft.app.exports.graphs.runtimes import Runtime
from lightpeft.app.exports.graphs.tracing import check_traceable, traceable, traced
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
    """Write a light model, PEFT merged into it, as a graph with its tokenizer and config.

    Layers may be unequally wide, and rows and tokens of a batch as many as one likes. A model that writes gets a graph
    with a KV cache, which reads prompts as well. `export.json` is transformers' manifest: its `ExportedModel` reads the
    folder.

    Args:
        model: a `LightModel`; it stays as it is, and a copy of it is merged, which takes its memory once more.
        folder: new or empty.
        tokenizer: says which inputs there are; None: token ids and attention mask.
        dtype: of weights, one of `runtime.writers`.
        overwrite: the folder may also hold such a graph, which goes with all that is in it.

    Raises:
        LightPeftError: a package is not installed, the model has no such graph or cannot be merged, or the
            folder cannot be written. Nothing is half-written.
    """
    folder = Path(folder)
    runtime.check(dtype)
    check_vacant(folder, replaceable=(folder / runtime.file).is_file(), overwrite=overwrite)
    check_traceable(transformers_model(cast(PeftModel, model)))  # before it is copied
    whole = traceable(merged_copy(model))
    with replacing_folder(folder, last=runtime.file, alone=True) as temporary:
        write_graph(whole, tokenizer, runtime, temporary, dtype)
        (temporary / CARD).write_text(_card(model, runtime), encoding="utf-8")


def write_graph(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, runtime: Runtime, folder: Path, dtype: str
) -> None:
    """Write graph, manifest, config and tokenizer of a model, pruned or not, that `traceable` has prepared.

    Args:
        folder: not there yet for others.

    Raises:
        LightPeftError: as `save_graph`.
    """
    runtime.write(model, traced(model, tokenizer), folder, dtype)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _card(model: Described, runtime: Runtime) -> str:
    plan, graph = model.light_plan, f" as a graph of {runtime.title}"
    form = whole_model_form(plan, runtime.use, graph, library=runtime.tool)
    return model_card(facts_of(model), plan, form)
