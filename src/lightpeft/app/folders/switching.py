"""Many tasks over one base in one process: light models are loaded on request and share weights of the base."""

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
    """Light adapters over one base, by task name: `switch["task"]` returns the light model of a task.

    A model is loaded on first request, from the files of base and adapter directly into the pruned layers, and computes
    bit for bit the same as the model of `load_light`. Weights of the base that its plan does not cut
    (embeddings, norms, the head, uncut matrices) are one tensor for all tasks; in host memory and the files' data type,
    the mapped file.

    All methods are thread-safe, and several threads may call the same model. Models are loaded one at a time, each
    once; cached models are returned meanwhile. The cache evicts the least recently used model, which is freed when no
    variable refers to it.

    Models are in evaluation mode and cannot be trained or merged; `load_light` returns a separate model for that.

    Example:
        ```python
        switch = LightSwitch({"reviews": "out/reviews", "topics": "out/topics"}, cache_size=2)
        logits = switch["reviews"](**inputs).logits
        ```
    """

    def __init__(
        self,
        tasks: Mapping[str, str | Path],
        base: str | Path | None = None,
        *,
        cache_size: int = 4,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """
        Args:
            tasks: name -> folder of a light adapter, or of a finished run that left one.
            base: name or folder of the base; None: the one that the adapters name.
            cache_size: number of models to cache; the least recently used one is evicted.
            dtype: data type of the base weights; None: as when the adapter was saved.
            device: device of the models; None: host memory.
            attn_implementation: attention implementation; None: the default of the base.
            trust_remote_code: run Python code that comes with the base, if it needs any.

        Raises:
            LightPeftError: `cache_size` is less than 1, or a task cannot be added (see `add`).
        """
        require(cache_size >= 1, f"cache_size is {cache_size}; set it to at least 1 model")
        self._base = None if base is None else str(base)
        self._cache_size, self._device = cache_size, device
        asked: dict[str, Any] = {"dtype": dtype and str(dtype).removeprefix("torch.")}
        asked["attn_implementation"] = attn_implementation
        asked["trust_remote_code"] = trust_remote_code
        self._settings = {name: value for name, value in asked.items() if value is not None}
        self._tasks: dict[str, LightAdapter] = {}
        self._descriptions: dict[str, Mapping[str, Any]] = {}
        self._kept: OrderedDict[str, SharingModel] = OrderedDict()
        self._shared = SharedTensors()
        self._tables_lock, self._load_lock = threading.RLock(), threading.Lock()
        for name, folder in tasks.items():
            self.add(name, folder)

    # Tasks

    def add(self, name: str, folder: str | Path) -> None:
        """Add a task. The adapter is checked now; its weights are read on the first request.

        The base's weights and file format are checked when they are first read.

        Args:
            name: a new task name.
            folder: a light adapter, or a finished run that left one.

        Raises:
            LightPeftError: the name is taken; the folder is not a light adapter; or its base differs from that of the
                other tasks, is quantized, or is a GGUF file.
        """
        found = find_light(folder, self._base, self._settings)
        saved = _base_of(found)
        kind = "quantized" if saved.quantization else "a GGUF file" if saved.gguf_file else None
        alone = f"the base of {found.name} is {kind}, which tasks cannot share; load it separately: load_light"
        require(kind is None, alone)
        with self._tables_lock:
            require(name not in self._tasks, f"the switch already has a task {name}; remove it, or give another name")
            for other in self._tasks.values():
                _check_same_base(found, other)
            self._tasks[name] = found

    def remove(self, name: str) -> None:
        """Remove a task. Its model is freed when no variable refers to it.

        Raises:
            LightPeftError: the task does not exist.
        """
        with self._tables_lock:
            self._find_task(name)
            for table in (self._tasks, self._descriptions, self._kept):
                table.pop(name, None)

    def close(self) -> None:
        """Remove all tasks."""
        with self._tables_lock:
            for name in self.names:
                self.remove(name)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks, in the order in which they were added."""
        with self._tables_lock:
            return tuple(self._tasks)

    @property
    def cached(self) -> tuple[str, ...]:
        """Names of the tasks whose models are cached, least recently used first."""
        with self._tables_lock:
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
        """Return the light model of a task, from the cache or newly loaded.

        Raises:
            LightPeftError: the task does not exist, or its model cannot be loaded; other models are not affected.
        """
        model = self._kept_model(name)
        if model is not None:
            return model
        with self._load_lock:
            model = self._kept_model(name)  # another thread may have loaded it meanwhile
            return self._load(name) if model is None else model

    def _kept_model(self, name: str) -> SharingModel | None:
        with self._tables_lock:
            self._find_task(name)
            model = self._kept.get(name)
            if model is not None:
                self._kept.move_to_end(name)
            return model

    def _load(self, name: str) -> SharingModel:
        task, known = self._find_task(name), self._descriptions.get(name)
        light = load_with_shared_tensors(task.folder, task.model, self._shared, device=self._device, known=known)
        model = _as_sharing(light)
        with self._tables_lock:
            if self._tasks.get(name) is task:  # it may have been removed meanwhile
                self._descriptions[name] = task.description
                self._kept[name] = model
                if len(self._kept) > self._cache_size:
                    self._kept.popitem(last=False)
        return model

    def _find_task(self, name: str) -> LightAdapter:
        with self._tables_lock:
            guess = nearest(name, self._tasks)
            meant = f"; did you mean {guess}?" if guess else f": it has {', '.join(self._tasks) or 'none'}"
            require(name in self._tasks, f"the switch has no task {name}{meant}")
            return self._tasks[name]


class SharingModel(LightModel):
    """A light model that shares weights with other tasks: for inference only.

    A deep copy has its own weights and is an ordinary `LightModel`.
    """

    def train(self, mode: bool = True) -> Self:
        return super().train(mode) if not mode else self._refuse("trained")

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("merged")

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise `LightPeftError`: merging would change weights of all tasks."""
        self._refuse("merged")

    def _refuse(self, what: str) -> NoReturn:
        alone = "use load_light, or copy.deepcopy of this model"
        raise LightPeftError(f"a switch's model shares its weights with other tasks and cannot be {what}; {alone}")

    def __deepcopy__(self, memo: dict[int, Any]) -> LightModel:
        own = cast(type[LightModel], type(self).__bases__[1])  # its class before `_as_sharing`
        twin = own.__new__(own)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def _as_sharing(light: LightModel) -> SharingModel:
    """Turn a light model into a `SharingModel`, in place, and return it."""
    own = type(light)
    light.__class__ = type(own.__name__, (SharingModel, own), {})
    return cast(SharingModel, light)


def _base_of(found: LightAdapter) -> BaseFacts:
    return base_facts(found.description, found.folder / DESCRIPTION)


def _check_same_base(found: LightAdapter, other: LightAdapter) -> None:
    """Raise `LightPeftError` if two adapters have different bases by name, revision or fingerprint."""
    places = [" in revision ".join(filter(None, (each.model.name, each.model.revision))) for each in (found, other)]
    two = f"{found.name} has the base {places[0]}, and {other.name} has {places[1]}"
    require(places[0] == places[1], f"{two}; if they are the same, give its name or folder: base=...")
    ours, theirs = _base_of(found), _base_of(other)
    # another head may rename weights, and another vocabulary drops rows: then the loader checks
    unlike = ours.architecture != theirs.architecture or found.vocabulary != other.vocabulary
    same = unlike or ours.fingerprint == theirs.fingerprint
    require(same, f"{found.name} has another base than {other.name}; use one switch per base")
