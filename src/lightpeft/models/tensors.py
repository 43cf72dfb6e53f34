"""Tensors of a checkpoint, read from its files when they are asked for; models may share whole ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightpeft.compat.transformers import Checkpoint, mark_read
from lightpeft.errors import require


class SharedTensors:
    """Whole tensors of checkpoints that several models have in common, each as long as one of these models lives."""

    def __init__(self) -> None:
        self._tensors: WeakValueDictionary[_Source, Tensor] = WeakValueDictionary()
        self._holders: WeakKeyDictionary[nn.Module, list[Tensor]] = WeakKeyDictionary()

    def find(self, source: _Source) -> Tensor | None:
        """The tensor, where some model has it."""
        return self._tensors.get(source)

    def keep(self, source: _Source, tensor: Tensor) -> None:
        """Let models that are read later find the tensor, for as long as somebody holds it."""
        self._tensors[source] = tensor

    def hold(self, model: nn.Module, tensors: Iterable[Tensor]) -> None:
        """Keep those of the tensors that are the model's as long as it lives."""
        own = {tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers())}
        self._holders[model] = [tensor for tensor in tensors if tensor.data_ptr() in own]

    @property
    def nbytes(self) -> int:
        """Of all tensors that are there."""
        return sum(tensor.nbytes for tensor in self._tensors.values())


class Reading:
    """The tensors of one load: which were shared by it, and which was read last."""

    def __init__(self, shared: SharedTensors | None, device: str | torch.device | None) -> None:
        self._shared = shared
        self._device = torch.device(device or "cpu")
        self._last: tuple[_Source, Tensor] | None = None
        self._used: list[Tensor] = []

    def read(self, stored: StoredTensor, dtype: torch.dtype | None) -> Tensor:
        """The tensor as it is shared; else from its file, in host memory."""
        self.forget()
        source = _Source(stored, dtype, self._device)
        found = None if self._shared is None else self._shared.find(source)
        if found is None:
            found = stored.mapped().to(dtype=dtype)
        self._last = source, found
        return found

    def place_of(self, parameter: Tensor) -> StoredTensor | None:
        """Where in the files a parameter lies that is the tensor read last, whole; None: it was made of that."""
        return None if self._last is None or not _is_same(parameter, self._last[1]) else self._last[0].stored

    def in_common(self, parameter: Tensor) -> nn.Parameter | None:
        """What a model gets instead of a parameter that is the tensor read last, whole, so that all models share it."""
        if self._shared is None or self._last is None:
            return None
        source, tensor = self._last
        if not _is_same(parameter, tensor):
            return None
        tensor = tensor.to(self._device)
        self._shared.keep(source, tensor)
        self._used.append(tensor)
        shared = nn.Parameter(tensor, requires_grad=False)
        mark_read(shared)
        return shared

    def forget(self) -> None:
        """Hold the tensor read last no longer."""
        self._last = None

    def hold(self, model: nn.Module) -> None:
        """Say that the model, which is all that was read, has what it shares for as long as it lives."""
        if self._shared is not None:
            self._shared.hold(model, self._used)
        self._used = []


@dataclass(frozen=True)
class _File:
    """A file as it is now: if it is written anew, its tensors are others."""

    path: str
    changed: int
    """Nanoseconds since the epoch."""
    size: int

    @classmethod
    def at(cls, path: str) -> _File:
        """The file that is there."""
        state = Path(path).stat()
        return cls(path, state.st_mtime_ns, state.st_size)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    file: _File
    key: str

    def mapped(self) -> Tensor:
        """The tensor on the CPU, over the file: pages are read when they are touched, and go when nobody holds it."""
        with safe_open(self.file.path, framework="pt") as opened:
            return opened.get_slice(self.key)[...]

    def check_unchanged(self) -> None:
        """Raise `LightPeftError` if the file has been written anew, or is gone."""
        there = Path(self.file.path).is_file() and _File.at(self.file.path) == self.file
        require(there, f"{self.file.path} has changed or gone while a model's weights were read from it; load it again")


@dataclass(frozen=True)
class _Source:
    """What a shared tensor was read from, and as what."""

    stored: StoredTensor
    dtype: torch.dtype | None
    device: torch.device


@dataclass(frozen=True)
class _OnDisk:
    """A tensor in a file, as transformers takes it: indexed as a whole, then asked for in a data type.

    It is read when it is asked for, and its file is open only so long.
    """

    stored: StoredTensor
    reading: Reading

    def __getitem__(self, everything: Any) -> _OnDisk:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """Read it into host memory, or find it among those that are shared."""
        return self.reading.read(self.stored, dtype)


def on_disk(files: Sequence[str], reading: Reading) -> dict[str, _OnDisk]:
    """Every tensor of the files by its name there; of equal names the last counts, as in transformers."""
    tensors = {}
    for path in files:
        file = _File.at(path)
        with safe_open(path, framework="pt") as opened:
            keys = opened.keys()
        tensors.update({key: _OnDisk(StoredTensor(file, key), reading) for key in keys})
    return tensors


def check_files(checkpoint: Checkpoint, instead: str) -> None:
    """Refuse a checkpoint whose tensors cannot be read one at a time.

    Args:
        instead: what to do, for the error line.
    """
    files = checkpoint.files
    require(not checkpoint.quantised, f"the base is quantised, which low_memory cannot read; {instead}")
    safe = bool(files) and all(str(file).endswith(".safetensors") for file in files)
    require(
        safe, f"low_memory reads safetensors files, which the base does not have; {instead}, or save the base in them"
    )


def _is_same(parameter: Tensor, tensor: Tensor) -> bool:
    """Whether a parameter is a tensor that was read, and nothing that transformers made of it."""
    return parameter.data_ptr() == tensor.data_ptr() and parameter.shape == tensor.shape
