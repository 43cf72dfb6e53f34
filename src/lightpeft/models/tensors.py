"""Lazily read tensors of a checkpoint, which several models may share."""

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
    """Tensors of checkpoints that several models share; each lives as long as one of these models."""

    def __init__(self) -> None:
        self._tensors: WeakValueDictionary[_Source, Tensor] = WeakValueDictionary()
        self._holders: WeakKeyDictionary[nn.Module, list[Tensor]] = WeakKeyDictionary()

    def find(self, source: _Source) -> Tensor | None:
        """Return the tensor if some model has it, else None."""
        return self._tensors.get(source)

    def keep(self, source: _Source, tensor: Tensor) -> None:
        """Offer a tensor to models that are read later, as long as it lives."""
        self._tensors[source] = tensor

    def hold(self, model: nn.Module, tensors: Iterable[Tensor]) -> None:
        """Keep the tensors that belong to a model alive as long as the model."""
        own = {tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers())}
        self._holders[model] = [tensor for tensor in tensors if tensor.data_ptr() in own]


class Reading:
    """State of one load: the tensors that it shares, and the tensor that was read last."""

    def __init__(self, shared: SharedTensors | None, device: str | torch.device | None) -> None:
        self._shared = shared
        self._device = torch.device(device or "cpu")
        self._last: tuple[_Source, Tensor] | None = None
        self._used: list[Tensor] = []

    def read(self, stored: StoredTensor, dtype: torch.dtype | None) -> Tensor:
        """Return the shared tensor, or read it from its file into host memory."""
        self.forget()
        source = _Source(stored, dtype, self._device)
        found = None if self._shared is None else self._shared.find(source)
        if found is None:
            found = stored.mapped().to(dtype=dtype)
        self._last = source, found
        return found

    def place_of(self, parameter: Tensor) -> StoredTensor | None:
        """Return the place on disk of a parameter that is the tensor read last; None: it was computed from that."""
        return None if self._last is None or not _is_same(parameter, self._last[1]) else self._last[0].stored

    def in_common(self, parameter: Tensor) -> nn.Parameter | None:
        """Return a shared parameter to replace one that is the tensor read last; None: it was computed from that."""
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
        """Drop the tensor read last."""
        self._last = None

    def hold(self, model: nn.Module) -> None:
        """Keep the shared tensors of this load alive as long as the loaded model."""
        if self._shared is not None:
            self._shared.hold(model, self._used)
        self._used = []


@dataclass(frozen=True)
class _File:
    """A file with its size and time of change, which identify its content."""

    path: str
    changed: int
    """Nanoseconds since the epoch."""
    size: int

    @classmethod
    def at(cls, path: str) -> _File:
        """Return the current state of the file at a path."""
        state = Path(path).stat()
        return cls(path, state.st_mtime_ns, state.st_size)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    file: _File
    key: str

    def mapped(self) -> Tensor:
        """Map the tensor from the file onto the CPU: pages are read on access, and freed with the tensor."""
        with safe_open(self.file.path, framework="pt") as opened:
            return opened.get_slice(self.key)[...]

    def check_unchanged(self) -> None:
        """Raise `LightPeftError` if the file has changed or was deleted."""
        there = Path(self.file.path).is_file() and _File.at(self.file.path) == self.file
        require(there, f"{self.file.path} has changed or gone, and a model reads its weights there; load it again")


@dataclass(frozen=True)
class _Source:
    """Key of a shared tensor: its place on disk, data type and device."""

    stored: StoredTensor
    dtype: torch.dtype | None
    device: torch.device


@dataclass(frozen=True)
class _OnDisk:
    """A tensor in a file with the interface that transformers uses: indexed as a whole, then converted to a type.

    `to` reads it, and its file is open only during the read.
    """

    stored: StoredTensor
    reading: Reading

    def __getitem__(self, everything: Any) -> _OnDisk:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """Read the tensor into host memory, or return the shared one."""
        return self.reading.read(self.stored, dtype)


def on_disk(files: Sequence[str], reading: Reading) -> dict[str, _OnDisk]:
    """Return name -> tensor of all files; of equal names the last one counts, as in transformers."""
    tensors = {}
    for path in files:
        file = _File.at(path)
        with safe_open(path, framework="pt") as opened:
            keys = opened.keys()
        tensors.update({key: _OnDisk(StoredTensor(file, key), reading) for key in keys})
    return tensors


def check_files(checkpoint: Checkpoint, instead: str) -> None:
    """Check that the tensors of a checkpoint can be read one at a time.

    Args:
        instead: remedy for the error message.
    """
    files = checkpoint.files
    require(not checkpoint.quantized, f"low_memory cannot read a quantized base; {instead}")
    safe = bool(files) and all(str(file).endswith(".safetensors") for file in files)
    require(
        safe, f"low_memory needs safetensors files, and the base has none; {instead}, or save the base as safetensors"
    )


def _is_same(parameter: Tensor, tensor: Tensor) -> bool:
    """Return whether a parameter has the memory and shape of a tensor, so that transformers did not convert it."""
    return parameter.data_ptr() == tensor.data_ptr() and parameter.shape == tensor.shape
