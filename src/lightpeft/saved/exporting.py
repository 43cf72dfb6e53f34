"""The forms that a light adapter can be given away in; each is one small class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, cast, get_args

from lightpeft.errors import require
from lightpeft.saved.forms import LightAdapter
from lightpeft.saved.full_width import copy_full_width, save_full_width
from lightpeft.saved.gguf.architectures import FAMILIES
from lightpeft.saved.gguf.exporting import save_gguf
from lightpeft.saved.gguf.writing import GgufType
from lightpeft.saved.merging import save_merged
from lightpeft.saved.run_folder import RunFolder


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
    def write(self, adapter: LightAdapter, folder: Path, overwrite: bool, dtype: str | None = None) -> str:
        """Write it, whole or not at all, and say who reads it.

        Args:
            folder: new or empty.
            overwrite: it may also hold the same form, which goes with all that is in it.
            dtype: of weights, one of `dtypes`; None: as they are.

        Raises:
            LightPeftError: the adapter has no such form, a file of it is damaged, or the folder cannot be written.
        """


class Merged(Export):
    """PEFT merged into the pruned base."""

    name = "merged"
    what = "a whole pruned model that needs no base"
    readers = (
        "`lightpeft.load_merged`; transformers and all others, where layers are equally wide and the config can say so"
    )
    limits = "no bottleneck adapters, no quantised bases"

    def write(self, adapter: LightAdapter, folder: Path, overwrite: bool, dtype: str | None = None) -> str:
        """As `save_merged`."""
        native = save_merged(adapter.load(), folder, adapter.tokenizer(), overwrite=overwrite)
        return "transformers" if native else "lightpeft.load_merged"


class FullWidth(Export):
    """PEFT's own form, over the whole base."""

    name = "peft"
    what = "a plain PEFT adapter over the whole base"
    readers = "PEFT and what is built on it, such as TRL; LoRA also servers, such as vLLM"
    limits = "a refit stays behind; bottleneck adapters need lightpeft imported; DoRA and trained biases read the base"

    def write(self, adapter: LightAdapter, folder: Path, overwrite: bool, dtype: str | None = None) -> str:
        """As `save_full_width`; of a run that trained it there for its last steps, what it left."""
        if adapter.run is not None and adapter.run.light.keep != "light":
            copy_full_width(RunFolder.at(adapter.folder.parent).full, folder, overwrite=overwrite)
        else:
            save_full_width(adapter.folder, adapter.model, folder, overwrite=overwrite)
        if adapter.vocabulary is None:
            return "PEFT"
        return f"PEFT, with all {adapter.vocabulary.size:,} tokens of the base and the base's own tokenizer,"


class Gguf(Export):
    """One file for llama.cpp."""

    name = "gguf"
    what = "a whole pruned model in one file, with its tokenizer,"
    readers = "llama.cpp, Ollama, LM Studio and others that are built on it"
    families = ", ".join(f"`{name}`" for name in FAMILIES)
    limits = (
        "models that write; BPE of bytes or of SentencePiece's pieces; attention in the first block (`qwen3` with "
        "unequal layers: in all, no biases, a tied head); rotary embeddings as usual, linear or Llama 3.1's; no "
        "bottleneck adapters, no quantised bases"
    )
    dtypes = tuple(kind for kind in get_args(GgufType) if kind != "auto")

    def write(self, adapter: LightAdapter, folder: Path, overwrite: bool, dtype: str | None = None) -> str:
        """As `save_gguf`."""
        tokenizer = adapter.tokenizer()
        require(tokenizer is not None, "a GGUF file has the tokenizer in it, and this adapter says of none")
        kind = cast(GgufType, dtype or "auto")
        written = save_gguf(adapter.load(), folder, tokenizer, dtype=kind, overwrite=overwrite)
        matrices = ", ".join(f"{count} in {kind}" for kind, count in written.matrices.items())
        if written.agreement is None:
            return f"llama.cpp (matrices: {matrices}; not compared, for want of llama-cpp-py-sync)"
        return f"llama.cpp (matrices: {matrices}; compared: logits differ by {written.agreement.difference:.2%})"


def export(adapter: LightAdapter, form: str, folder: Path, *, overwrite: bool = False, dtype: str | None = None) -> str:
    """Write one of `EXPORTS`; arguments, what it gives and errors as of `Export.write`.

    Raises:
        LightPeftError: weights of this form are not written in that `dtype`.
    """
    taking = [name for name, each in EXPORTS.items() if dtype in each.dtypes]
    fits = dtype is None or form in taking
    require(fits, f"weights are written in {dtype} in the form {' or '.join(taking) or 'of nobody'}, not in {form}")
    return EXPORTS[form].write(adapter, folder, overwrite, dtype)


EXPORTS: dict[str, Export] = {form.name: form for form in (Merged(), FullWidth(), Gguf())}
"""Name -> form."""
