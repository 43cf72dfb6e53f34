"""Many tasks over one base in one process: light models are made when they are asked for, and share what they can."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self, cast

import torch

from lightpeft.adapters.light_adapter import load_with_shared_tensors
from lightpeft.app.folders.forms import LightAdapter
from lightpeft.app.folders.opening import find_light
from lightpeft.errors import LightPeftError, nearest, require
from lightpeft.models.tensors import SharedTensors
from lightpeft.prune.light_model import LightModel
from lightpeft.saving.adapter_files import DESCRIPTION
from lightpeft.saving.description import BaseFacts, base_facts


class LightSwitch:
    """Light adapters over one base, by the names of their tasks: `switch["task"]` is the light model of a task.

    A model is read from the files of base and adapter when it is asked for, straight into its cut layers, and gives bit
    for bit what `load_light` gives. What its plan leaves whole of the base (embeddings, norms, the head, matrices that
    lost nothing) is one tensor for all tasks. In host memory, and in the data type of the files, it is the mapped file.

    Every method may be called from any thread, and a model, also one and the same, asked by several threads at a time.
    Models are made one after the other, each once, whoever asks for it; those that are there are handed out meanwhile.
    A model that goes lives on as long as somebody holds it: a thread is safe with what it has in a variable.

    Models are in evaluation mode, and refuse to be trained or merged: for that, `load_light` gives one that is alone.
    """

    def __init__(
        self,
        tasks: Mapping[str, str | Path],
        base: str | Path | None = None,
        *,
        most: int = 4,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """
        Args:
            tasks: name -> folder of a light adapter, or of a finished run that left one.
            base: name or folder of the base; None: the one that all of them name.
            most: models that stay; beyond them, the one that was asked for the longest time ago goes.
            dtype: of the base weights; None: as they were when the adapter was saved.
            device: where to put models; None: host memory.
            attn_implementation: attention backend; None: the one the base would use.
            trust_remote_code: run Python code that comes with the base, if it needs any.

        Raises:
            LightPeftError: as `add`.
        """
        require(most >= 1, f"most is {most}; a switch keeps at least 1 model")
        self._base = None if base is None else str(base)
        self._most, self._device = most, device
        asked: dict[str, Any] = {"dtype": dtype and str(dtype).removeprefix("torch.")}
        asked["attn_implementation"] = attn_implementation
        asked["trust_remote_code"] = trust_remote_code
        self._settings = {name: value for name, value in asked.items() if value is not None}
        self._tasks: dict[str, LightAdapter] = {}
        self._known: dict[str, Mapping[str, Any]] = {}
        self._kept: OrderedDict[str, SharingModel] = OrderedDict()
        self._shared = SharedTensors()
        self._tables, self._making = threading.RLock(), threading.Lock()
        for name, folder in tasks.items():
            self.add(name, folder)

    # Tasks

    def add(self, name: str, folder: str | Path) -> None:
        """Add a task. Its adapter is checked, and no weight is read before its model is asked for.

        Whether the weights of the base are the right ones, and in safetensors files, shows when they are first read.

        Raises:
            LightPeftError: there is a task of this name; the folder holds something else than a light adapter; or its
                base is another one than that of the tasks here, or quantised, or a GGUF file.
        """
        found = find_light(folder, self._base, self._settings)
        saved = _base_of(found)
        kind = "quantised" if saved.quantisation else "a GGUF file" if saved.gguf_file else None
        alone = f"the base of {found.name} is {kind}, which tasks cannot share; load it alone: load_light"
        require(kind is None, alone)
        with self._tables:
            require(name not in self._tasks, f"the switch has a task {name} already; remove it, or give another name")
            for other in self._tasks.values():
                _check_same_base(found, other)
            self._tasks[name] = found

    def remove(self, name: str) -> None:
        """Forget a task. Its model is freed when nobody holds it any more.

        Raises:
            LightPeftError: there is no such task.
        """
        with self._tables:
            self._task(name)
            for table in (self._tasks, self._known, self._kept):
                table.pop(name, None)

    def close(self) -> None:
        """Forget all tasks."""
        with self._tables:
            for name in self.names:
                self.remove(name)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tasks, in the order in which they were added."""
        with self._tables:
            return tuple(self._tasks)

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the tasks whose models are here, the one that would go first at the beginning."""
        with self._tables:
            return tuple(self._kept)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Models

    def __getitem__(self, name: str) -> LightModel:
        """The light model of a task: the one that is here, or else a new one.

        Raises:
            LightPeftError: there is no such task, or as `load_light`; all other models stay as they are.
        """
        model = self._present(name)
        if model is not None:
            return model
        with self._making:
            model = self._present(name)  # made by a thread that this one waited for
            return self._load(name) if model is None else model

    def _present(self, name: str) -> SharingModel | None:
        with self._tables:
            self._task(name)
            model = self._kept.get(name)
            if model is not None:
                self._kept.move_to_end(name)
            return model

    def _load(self, name: str) -> SharingModel:
        task, known = self._task(name), self._known.get(name)
        light = load_with_shared_tensors(task.folder, task.model, self._shared, device=self._device, known=known)
        model = _as_sharing(light)
        with self._tables:
            if self._tasks.get(name) is task:  # it may have been removed meanwhile
                self._known[name] = task.description
                self._kept[name] = model
                if len(self._kept) > self._most:
                    self._kept.popitem(last=False)
        return model

    def _task(self, name: str) -> LightAdapter:
        with self._tables:
            guess = nearest(name, self._tasks)
            meant = f"; did you mean {guess}?" if guess else f": it has {', '.join(self._tasks) or 'none'}"
            require(name in self._tasks, f"the switch has no task {name}{meant}")
            return self._tasks[name]


class SharingModel(LightModel):
    """A light model that reads weights which models of other tasks read, too: it answers, and nothing in it changes.

    A deep copy has all its weights to itself, and is a `LightModel` like any other.
    """

    def train(self, mode: bool = True) -> Self:
        return super().train(mode) if not mode else self._refuse("trained")

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("merged")

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as `merge_and_unload`: it would be merged into weights of all tasks."""
        self._refuse("merged")

    def _refuse(self, what: str) -> NoReturn:
        alone = "load_light gives one that is alone, and so does copy.deepcopy of this one"
        raise LightPeftError(f"a switch's model shares its weights with other tasks and cannot be {what}; {alone}")

    def __deepcopy__(self, memo: dict[int, Any]) -> LightModel:
        own = cast(type[LightModel], type(self).__bases__[1])  # what it was before it was one of these
        twin = own.__new__(own)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def _as_sharing(light: LightModel) -> SharingModel:
    """The same object, which refuses to be changed."""
    own = type(light)
    light.__class__ = type(own.__name__, (SharingModel, own), {})
    return cast(SharingModel, light)


def _base_of(found: LightAdapter) -> BaseFacts:
    return base_facts(found.description, found.folder / DESCRIPTION)


def _check_same_base(found: LightAdapter, other: LightAdapter) -> None:
    """Refuse two adapters whose bases are two, as far as they say it themselves."""
    places = [" in revision ".join(filter(None, (each.model.name, each.model.revision))) for each in (found, other)]
    two = f"{found.name} is over the base {places[0]}, and {other.name} over {places[1]}"
    require(places[0] == places[1], f"{two}; if they are the same, say where it is: base=...")
    ours, theirs = _base_of(found), _base_of(other)
    # another head may call the same weights otherwise, and other tokens are other rows of them: then the loader tells
    unlike = ours.architecture != theirs.architecture or found.vocabulary != other.vocabulary
    same = unlike or ours.fingerprint == theirs.fingerprint
    require(same, f"{found.name} belongs to another base than {other.name}; a switch has tasks over one base")
