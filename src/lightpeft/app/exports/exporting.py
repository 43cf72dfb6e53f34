"""The forms that a light model can be given away in; each is one function, which imports what is heavy itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightpeft.errors import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightpeft.app.folders.forms import LightAdapter
    from lightpeft.prune.light_model import LightModel


@dataclass(frozen=True)
class Form:
    """One form."""

    what: str
    """Is in the folder, for people."""
    write: Callable[[LightModel, Any, Path, bool, str | None], str] | None
    """Writes a live model with its tokenizer into a folder, whole or not at all, and says what loads it, for people.
    The last two arguments: whether the folder may hold the same form, which is replaced; data type of weights. None: it
    is no whole model."""
    dtypes: tuple[str, ...] = ()
    """That its weights can be written in, if not as they are."""


def _merged(model: LightModel, tokenizer: Any, folder: Path, overwrite: bool, dtype: str | None) -> str:
    from lightpeft.adapters.merging import save_merged

    native = save_merged(model, folder, tokenizer, overwrite=overwrite)
    return "transformers" if native else "lightpeft.load_merged"


def _gguf(model: LightModel, tokenizer: Any, folder: Path, overwrite: bool, dtype: Any) -> str:
    from lightpeft.app.exports.gguf.exporting import save_gguf

    require(tokenizer is not None, "a GGUF file has the tokenizer in it, and there is none")
    written = save_gguf(model, folder, tokenizer, dtype=dtype or "auto", overwrite=overwrite)
    matrices = ", ".join(f"{count} in {kind}" for kind, count in written.matrices.items())
    return f"llama.cpp (matrices: {matrices})"


def _graph(name: str, model: LightModel, tokenizer: Any, folder: Path, overwrite: bool, dtype: str | None) -> str:
    from lightpeft.app.exports.graphs.exporting import save_graph
    from lightpeft.app.exports.graphs.runtimes import RUNTIMES

    runtime, kind = RUNTIMES[name], dtype or "f32"
    save_graph(model, folder, tokenizer, runtime, dtype=kind, overwrite=overwrite)
    return f"{runtime.title} ({kind})"


EXPORTS: dict[str, Form] = {
    "merged": Form("a whole model that needs no base", _merged),
    "peft": Form("a plain PEFT adapter over the whole base", None),
    "gguf": Form("a whole model in one file, with its tokenizer", _gguf, ("f32", "f16", "bf16", "q8_0")),
    "onnx": Form("a whole model as an ONNX graph, with tokenizer and config", partial(_graph, "onnx"), ("f32", "int8")),
    "openvino": Form(
        "a whole model as an OpenVINO graph, with tokenizer and config",
        partial(_graph, "openvino"),
        ("f32", "f16", "int8"),
    ),
}
"""Name -> form."""

DTYPES = tuple(dict.fromkeys(dtype for form in EXPORTS.values() for dtype in form.dtypes))
"""That weights can be written in, in one form or another."""


def export(adapter: LightAdapter, form: str, folder: Path, *, overwrite: bool = False, dtype: str | None = None) -> str:
    """Write a saved light adapter in one of `EXPORTS`; arguments, what it gives and errors as of `export_model`."""
    write = _checked(form, dtype).write
    if write is None:
        return _full_width(adapter, folder, overwrite)
    return write(adapter.load(), adapter.tokenizer(), folder, overwrite, dtype)


def _full_width(adapter: LightAdapter, folder: Path, overwrite: bool) -> str:
    """As PEFT writes adapters; of a run that trained at full width for its last steps, what it left."""
    from lightpeft.adapters.full_width import copy_full_width, save_full_width
    from lightpeft.app.folders.run_folder import RunFolder

    if adapter.run is not None and adapter.run.light.after.keep != "light":
        copy_full_width(RunFolder.at(adapter.folder.parent).full, folder, overwrite=overwrite)
    else:
        save_full_width(adapter.folder, adapter.model, folder, overwrite=overwrite)
    if adapter.vocabulary is None:
        return "PEFT"
    return f"PEFT, with all {adapter.vocabulary.size:,} tokens of the base and the base's own tokenizer,"


def export_model(
    model: LightModel,
    folder: str | Path,
    form: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> str:
    """Write a live light model in one of the forms of `lightpeft export`, but for `peft` (of which see `full_width`).

    Args:
        model: a `LightModel`; it stays as it is, and a copy of it is merged, which takes its memory once more.
        folder: new or empty.
        form: name of one of `EXPORTS`.
        tokenizer: to be written with it.
        dtype: of weights, one of the form's; None: as they are.
        overwrite: the folder may also hold the same form, which goes with all that is in it.

    Returns:
        What loads it, for people.

    Raises:
        LightPeftError: there is no such form, or not in that `dtype`; a package that writes it is not installed; the
            model cannot have it; or the folder cannot be written. Nothing is half-written.
    """
    write = _checked(form, dtype).write
    require(write is not None, f"the form {form} is no whole model; use full_width(light)")
    assert write is not None
    return write(model, tokenizer, Path(folder), overwrite, dtype)


def _checked(form: str, dtype: str | None) -> Form:
    """A form by its name, if its weights are written so."""
    require(form in EXPORTS, f'there is no form "{form}"; choose one of {", ".join(EXPORTS)}')
    taking = [name for name, each in EXPORTS.items() if dtype in each.dtypes]
    fits = dtype is None or form in taking
    require(fits, f"weights are written in {dtype} in the form {' or '.join(taking) or 'of nobody'}, not in {form}")
    return EXPORTS[form]
