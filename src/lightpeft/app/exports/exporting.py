"""The forms that a light model can be given away in; each is one small class, which imports what is heavy itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lightpeft.errors import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightpeft.app.exports.agreement import Agreement
    from lightpeft.app.folders.forms import LightAdapter
    from lightpeft.prune.light_model import LightModel


@dataclass(frozen=True)
class Exported:
    """What was written."""

    reader: str
    """Loads it, for people."""
    facts: tuple[str, ...] = ()
    """What is to be said of it, for people."""
    agreement: Agreement | None = None
    """With what the reader computes from it; None: nobody looked."""

    def __str__(self) -> str:
        return f"{self.reader} ({'; '.join(self.facts)})" if self.facts else self.reader


class Export(ABC):
    """One form."""

    name: ClassVar[str]
    what: ClassVar[str]
    """Is in the folder, for people."""
    readers: ClassVar[str]
    """Who reads it, for people."""
    families: ClassVar[str] = "all"
    """Of whose models there is such a form."""
    limits: ClassVar[str]
    """What it cannot be, or leaves out, for people."""
    dtypes: ClassVar[tuple[str, ...]] = ()
    """That its weights can be written in, if not as they are."""

    @abstractmethod
    def write(self, adapter: LightAdapter, folder: Path, overwrite: bool, dtype: str | None = None) -> Exported:
        """Write it, whole or not at all.

        Args:
            folder: new or empty.
            overwrite: it may also hold the same form, which goes with all that is in it.
            dtype: of weights, one of `dtypes`; None: as they are.

        Raises:
            LightPeftError: the adapter has no such form, a file of it is damaged, or the folder cannot be written.
        """


class WholeExport(Export):
    """A form of the whole model, for which a live one will do."""

    def write(self, adapter: LightAdapter, folder: Path, overwrite: bool, dtype: str | None = None) -> Exported:
        """As `write_model`."""
        return self.write_model(adapter.load(), adapter.tokenizer(), folder, overwrite, dtype)

    @abstractmethod
    def write_model(
        self,
        model: LightModel,
        tokenizer: PreTrainedTokenizerBase | None,
        folder: Path,
        overwrite: bool,
        dtype: str | None = None,
    ) -> Exported:
        """Write a live model, which stays as it is; what else is said as for `write`."""


class Merged(WholeExport):
    """PEFT merged into the pruned base."""

    name = "merged"
    what = "a whole model that needs no base"
    readers = (
        "`lightpeft.load_merged`; vLLM by a plug-in (writing models of `llama`, `mistral`, `qwen2` and `qwen3`); "
        "transformers and all others, where layers are equally wide and the config can say so"
    )
    limits = "no bottleneck adapters, no quantised bases"

    def write_model(
        self, model: LightModel, tokenizer: Any, folder: Path, overwrite: bool, dtype: Any = None
    ) -> Exported:
        """As `save_merged`."""
        from lightpeft.adapters.merging import save_merged

        native = save_merged(model, folder, tokenizer, overwrite=overwrite)
        return Exported("transformers" if native else "lightpeft.load_merged")


class FullWidth(Export):
    """PEFT's own form, over the whole base."""

    name = "peft"
    what = "a plain PEFT adapter over the whole base"
    readers = "PEFT and what is built on it, such as TRL; LoRA also servers, such as vLLM"
    limits = "bottleneck adapters need lightpeft imported; DoRA and trained biases read the base"

    def write(self, adapter: LightAdapter, folder: Path, overwrite: bool, dtype: str | None = None) -> Exported:
        """As `save_full_width`; of a run that trained it there for its last steps, what it left."""
        from lightpeft.adapters.full_width import copy_full_width, save_full_width
        from lightpeft.app.folders.run_folder import RunFolder

        if adapter.run is not None and adapter.run.light.keep != "light":
            copy_full_width(RunFolder.at(adapter.folder.parent).full, folder, overwrite=overwrite)
        else:
            save_full_width(adapter.folder, adapter.model, folder, overwrite=overwrite)
        if adapter.vocabulary is None:
            return Exported("PEFT")
        return Exported(f"PEFT, with all {adapter.vocabulary.size:,} tokens of the base and the base's own tokenizer,")


class Gguf(WholeExport):
    """One file for llama.cpp."""

    name = "gguf"
    what = "a whole model in one file, with its tokenizer"
    readers = "llama.cpp, Ollama, LM Studio and others that are built on it"
    families = "`llama`, `mistral`, `qwen2`, `qwen3`"
    limits = (
        "models that write; BPE of bytes or of SentencePiece's pieces; attention in the first block (`qwen3` with "
        "unequal layers: in all, no biases, a tied head); rotary embeddings as usual, linear or Llama 3.1's; no "
        "bottleneck adapters, no quantised bases"
    )
    dtypes = ("f32", "f16", "bf16", "q8_0")

    def write_model(
        self, model: LightModel, tokenizer: Any, folder: Path, overwrite: bool, dtype: Any = None
    ) -> Exported:
        """As `save_gguf`."""
        from lightpeft.app.exports.gguf.exporting import save_gguf

        require(tokenizer is not None, "a GGUF file has the tokenizer in it, and there is none")
        written = save_gguf(model, folder, tokenizer, dtype=dtype or "auto", overwrite=overwrite)
        matrices = ", ".join(f"{count} in {kind}" for kind, count in written.matrices.items())
        compared = _compared(written.agreement, "llama-cpp-py-sync")
        return Exported("llama.cpp", (f"matrices: {matrices}", compared), written.agreement)


class Graph(WholeExport):
    """A computation graph for one runtime."""

    families = "encoders and decoders that read text"
    limits = (
        "no bottleneck adapters, no quantised bases, no routed experts, no rotary embeddings of the type `dynamic`; "
        "f32 unless it is said otherwise, whatever the base's weights are"
    )

    def write_model(
        self, model: LightModel, tokenizer: Any, folder: Path, overwrite: bool, dtype: Any = None
    ) -> Exported:
        """As `save_graph`."""
        from lightpeft.app.exports.graphs.exporting import save_graph
        from lightpeft.app.exports.graphs.runtimes import RUNTIMES

        runtime, kind = RUNTIMES[self.name], dtype or "f32"
        agreement = save_graph(model, folder, tokenizer, runtime, dtype=kind, overwrite=overwrite)
        return Exported(runtime.title, (kind, _compared(agreement, runtime.tool)), agreement)


class Onnx(Graph):
    """For ONNX Runtime and all else that reads ONNX."""

    name = "onnx"
    what = "a whole model as an ONNX graph, with tokenizer and config"
    readers = "ONNX Runtime and what else runs ONNX; transformers' `ExportedModel`"
    dtypes = ("f32", "int8")


class OpenVino(Graph):
    """For OpenVINO."""

    name = "openvino"
    what = "a whole model as an OpenVINO graph, with tokenizer and config"
    readers = "OpenVINO; transformers' `ExportedModel`"
    dtypes = ("f32", "f16", "int8")


def export(
    adapter: LightAdapter, form: str, folder: Path, *, overwrite: bool = False, dtype: str | None = None
) -> Exported:
    """Write one of `EXPORTS`; arguments, what it gives and errors as of `Export.write`.

    Raises:
        LightPeftError: weights of this form are not written in that `dtype`.
    """
    return _checked(form, dtype).write(adapter, folder, overwrite, dtype)


def export_model(
    model: LightModel,
    folder: str | Path,
    form: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a live light model in one of the forms of `lightpeft export`, but for `peft` (of which see `full_width`).

    Args:
        model: a `LightModel`; it stays as it is, and a copy of it is merged, which takes its memory once more.
        folder: new or empty.
        form: name of one of `EXPORTS`.
        tokenizer: to be written with it.
        dtype: of weights, one of the form's; None: as they are.
        overwrite: the folder may also hold the same form, which goes with all that is in it.

    Raises:
        LightPeftError: there is no such form, or not in that `dtype`; a package that writes it is not installed; the
            model cannot have it; or the folder cannot be written. Nothing is half-written.
    """
    written = _checked(form, dtype)
    require(isinstance(written, WholeExport), f"the form {form} is no whole model; use full_width(light)")
    assert isinstance(written, WholeExport)
    return written.write_model(model, tokenizer, Path(folder), overwrite, dtype)


def _checked(form: str, dtype: str | None) -> Export:
    """A form by its name, if its weights are written so."""
    require(form in EXPORTS, f'there is no form "{form}"; choose one of {", ".join(EXPORTS)}')
    taking = [name for name, each in EXPORTS.items() if dtype in each.dtypes]
    fits = dtype is None or form in taking
    require(fits, f"weights are written in {dtype} in the form {' or '.join(taking) or 'of nobody'}, not in {form}")
    return EXPORTS[form]


def _compared(agreement: Agreement | None, package: str) -> str:
    """How near a reader is, or why nobody knows."""
    if agreement is None:
        return f"not compared, for want of {package}"
    near = agreement.difference < 1e-4
    return f"compared: logits differ by {'less than 0.01%' if near else format(agreement.difference, '.2%')}"


EXPORTS: dict[str, Export] = {form.name: form for form in (Merged(), FullWidth(), Gguf(), Onnx(), OpenVino())}
"""Name -> form."""

DTYPES = tuple(dict.fromkeys(dtype for form in EXPORTS.values() for dtype in form.dtypes))
"""That weights can be written in, in one form or another."""
