"""The forms that a light adapter can be given away in; each is one small class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from lightpeft.saved.forms import LightAdapter
from lightpeft.saved.full_width import copy_full_width, save_full_width
from lightpeft.saved.merging import save_merged
from lightpeft.saved.run_folder import RunFolder


class Export(ABC):
    """One form."""

    name: ClassVar[str]
    what: ClassVar[str]
    """Is in the folder, for people."""

    @abstractmethod
    def write(self, adapter: LightAdapter, folder: Path, overwrite: bool) -> str:
        """Write it, whole or not at all, and say who reads it.

        Args:
            folder: new or empty.
            overwrite: it may also hold the same form, which goes with all that is in it.

        Raises:
            LightPeftError: the adapter has no such form, a file of it is damaged, or the folder cannot be written.
        """


class Merged(Export):
    """PEFT merged into the pruned base."""

    name = "merged"
    what = "a whole pruned model that needs no base"

    def write(self, adapter: LightAdapter, folder: Path, overwrite: bool) -> str:
        """As `save_merged`."""
        native = save_merged(adapter.load(), folder, adapter.tokenizer(), overwrite=overwrite)
        return "transformers" if native else "lightpeft.load_merged"


class FullWidth(Export):
    """PEFT's own form, over the whole base."""

    name = "peft"
    what = "a plain PEFT adapter over the whole base"

    def write(self, adapter: LightAdapter, folder: Path, overwrite: bool) -> str:
        """As `save_full_width`; of a run that trained it there for its last steps, what it left."""
        if adapter.run is not None and adapter.run.light.keep != "light":
            copy_full_width(RunFolder.at(adapter.folder.parent).full, folder, overwrite=overwrite)
        else:
            save_full_width(adapter.folder, adapter.model, folder, overwrite=overwrite)
        return "PEFT"


EXPORTS: dict[str, Export] = {form.name: form for form in (Merged(), FullWidth())}
"""Name -> form."""
