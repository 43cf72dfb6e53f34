"""The export forms of a light model; each is one function, which imports its heavy dependencies itself."""

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
class ExportForm:
    """One export form."""

    what: str
    """Content of the folder, as text for users."""
    write: Callable[[LightModel, Any, Path, bool, str | None], str] | None
    """Function (model, tokenizer, folder, overwrite, dtype) that writes a live model, completely or not at all, and
    returns its loader as text for users. `overwrite`: replace the same form. None: the form is no whole model."""
    dtypes: tuple[str, ...] = ()
    """Data types for its weights, besides their own."""


def _write_merged(model: LightModel, tokenizer: Any, folder: Path, overwrite: bool, dtype: str | None) -> str:
    from lightpeft.adapters.merging import save_merged

    native = save_merged(model, folder, tokenizer, overwrite=overwrite)
    return "transformers" if native else "lightpeft.load_merged"


def _write_gguf(model: LightModel, tokenizer: Any, folder: Path, overwrite: bool, dtype: Any) -> str:
    from lightpeft.app.exports.gguf.exporting import save_gguf

    require(tokenizer is not None, "form gguf needs a tokenizer, which the file contains; pass one")
    written = save_gguf(model, folder, tokenizer, dtype=dtype or "auto", overwrite=overwrite)
    matrices = ", ".join(f"{count} in {kind}" for kind, count in written.matrices.items())
    return f"llama.cpp (matrices: {matrices})"


def _write_graph(name: str, model: LightModel, tokenizer: Any, folder: Path, overwrite: bool, dtype: str | None) -> str:
    from lightpeft.app.exports.graphs.exporting import save_graph
    from lightpeft.app.exports.graphs.runtimes import RUNTIMES

    runtime, kind = RUNTIMES[name], dtype or "f32"
    save_graph(model, folder, tokenizer, runtime, dtype=kind, overwrite=overwrite)
    return f"{runtime.title} ({kind})"


EXPORTS: dict[str, ExportForm] = {
    "merged": ExportForm("a whole model that needs no base", _write_merged),
    "peft": ExportForm("a plain PEFT adapter over the whole base", None),
    "gguf": ExportForm("a whole model in one file, with its tokenizer", _write_gguf, ("f32", "f16", "bf16", "q8_0")),
    "onnx": ExportForm(
        "a whole model as an ONNX graph, with tokenizer and config", partial(_write_graph, "onnx"), ("f32", "int8")
    ),
    "openvino": ExportForm(
        "a whole model as an OpenVINO graph, with tokenizer and config",
        partial(_write_graph, "openvino"),
        ("f32", "f16", "int8"),
    ),
}
"""Name -> form."""

DTYPES = tuple(dict.fromkeys(dtype for form in EXPORTS.values() for dtype in form.dtypes))
"""Data types for weights, over all forms."""


def export(adapter: LightAdapter, form: str, folder: Path, *, overwrite: bool = False, dtype: str | None = None) -> str:
    """Write a saved light adapter in a form of `EXPORTS`, as `export_model` writes a live model.

    Args:
        adapter: the adapter.
        form: a key of `EXPORTS`.
        folder: a new or empty folder.
        overwrite: True to replace the same form in the folder.
        dtype: data type of weights, one of the form's; None: unchanged.

    Returns:
        The loader of the result, as text for users.

    Raises:
        LightPeftError: the form does not exist or does not support `dtype`, a package is missing, the model cannot be
            exported so, or the folder cannot be written. Nothing is half-written.
    """
    write = _find_form(form, dtype).write
    if write is None:
        return _write_full_width(adapter, folder, overwrite)
    return write(adapter.load(), adapter.tokenizer(), folder, overwrite, dtype)


def _write_full_width(adapter: LightAdapter, folder: Path, overwrite: bool) -> str:
    """Write a plain PEFT adapter; for a run whose last steps trained at full width, the adapter of these."""
    from lightpeft.adapters.full_width import copy_full_width, save_full_width
    from lightpeft.app.folders.run_folder import RunFolder

    if adapter.run is not None and adapter.run.light.after.keep != "light":
        copy_full_width(RunFolder.at(adapter.folder.parent).full, folder, overwrite=overwrite)
    else:
        save_full_width(adapter.folder, adapter.model, folder, overwrite=overwrite)
    if adapter.vocabulary is None:
        return "PEFT"
    return f"PEFT, with all {adapter.vocabulary.size:,} tokens of the base and the base's own tokenizer"


def export_model(
    model: LightModel,
    folder: str | Path,
    form: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> str:
    """Write a live light model in a form of `lightpeft export`, except `peft` (see `full_width`).

    Args:
        model: a `LightModel`. It does not change: a copy is merged, which takes the memory of the model once more.
        folder: a new or empty folder.
        form: "merged", "gguf", "onnx" or "openvino".
        tokenizer: tokenizer to write with the model; "gguf" needs it.
        dtype: data type of weights, one of the form's; None: unchanged.
        overwrite: True to replace the same form in the folder, with all its files.

    Returns:
        The loader of the result, as text for users, such as "ONNX Runtime (int8)".

    Raises:
        LightPeftError: the form does not exist or does not support `dtype`; a package is not installed; the model
            cannot be exported so; or the folder cannot be written. Nothing is half-written.

    Example:
        ```python
        export_model(load_light("adapter"), "onnx_model", "onnx", light_tokenizer("adapter"), dtype="int8")
        ```
    """
    write = _find_form(form, dtype).write
    require(write is not None, f"form {form} is an adapter, not a whole model; use full_width(light)")
    assert write is not None
    return write(model, tokenizer, Path(folder), overwrite, dtype)


def _find_form(form: str, dtype: str | None) -> ExportForm:
    """Return the form with that name, after a check that it supports `dtype`."""
    require(form in EXPORTS, f'export form "{form}" does not exist; choose one of {", ".join(EXPORTS)}')
    found = EXPORTS[form]
    hint = f"choose {' or '.join(found.dtypes)}" if found.dtypes else "leave it out"
    require(dtype is None or dtype in found.dtypes, f"dtype {dtype} is not supported by form {form}; {hint}")
    return found
