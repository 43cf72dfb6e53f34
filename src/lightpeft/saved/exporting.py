"""The forms that a light adapter can be given away in; each is one small class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, cast, get_args

from lightpeft.errors import require
from lightpeft.saved.forms import LightAdapter
from lightpeft.saved.full_width import copy_full_width, save_full_width
from lightpeft.saved.gguf.exporting import save_gguf
from lightpeft.saved.gguf.writing import GgufType
from lightpeft.saved.merging import save_merged
from lightpeft.saved.run_folder import RunFolder


class Export(ABC):
    """One form."""

    name: ClassVar[str]
    what: ClassVar[str]
    """Is in the folder, for people."""
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

    def write(self, adapter: LightAdapter, folder: Path, overwrite: bool, dtype: str | None = None) -> str:
        """As `save_merged`."""
        native = save_merged(adapter.load(), folder, adapter.tokenizer(), overwrite=overwrite)
        return "transformers" if native else "lightpeft.load_merged"


class FullWidth(Export):
    """PEFT's own form, over the whole base."""

    name = "peft"
    what = "a plain PEFT adapter over the whole base"

    def write(self, adapter: LightAdapter, folder: Path, overwrite: bool, dtype: str | None = None) -> str:
        """As `save_full_width`; of a run that trained it there for its last steps, what it left."""
        if adapter.run is not None and adapter.run.light.keep != "light":
            copy_full_width(RunFolder.at(adapter.folder.parent).full, folder, overwrite=overwrite)
        else:
            save_full_width(adapter.folder, adapter.model, folder, overwrite=overwrite)
        return "PEFT"


class Gguf(Export):
    """One file for llama.cpp."""

    name = "gguf"
    what = "a whole pruned model in one file, with its tokenizer,"
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


EXPORTS: dict[str, Export] = {form.name: form for form in (Merged(), FullWidth(), Gguf())}
"""Name -> form."""
