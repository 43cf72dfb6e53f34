"""Peak memory of a piece of work."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
import threading
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import Tensor, nn

from lightpeft.profiling.live import device_of

MemoryMethod = Literal["cuda", "VmHWM", "sampling"]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_TOLERANCE = 64 * 2**20
_SAMPLING_SECONDS = 0.002


class PeakMemory:
    """Context manager that measures the peak memory inside its block, in bytes.

    On CUDA it is the memory allocated on the model's (first) device, weights included. Elsewhere it is the resident
    memory of the process beyond that at entry. All weights are read into memory at entry, because transformers maps
    them from files, and pages that are first read inside the block would count. Blocks cannot be nested, since each
    resets the high-water mark. Resident memory depends on earlier work of the process; to compare models, run each in
    a process of its own.

        with PeakMemory(model) as memory:
            train(model)
        memory.bytes
    """

    method: MemoryMethod
    """Source of the number: "cuda" allocator statistics, "VmHWM" the kernel's high-water mark, or "sampling" by a
    thread (which can miss a short peak)."""
    before: int
    """Bytes in use at entry."""
    peak: int
    """Maximum of the bytes in use inside the block, those at entry included."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._device = model, device_of(model)
        self._sampler: _Sampler | None = None
        self.method = "cuda" if self._device.type == "cuda" else "VmHWM"
        self.before = self.peak = 0

    @property
    def bytes(self) -> int:
        """Result in bytes: on CUDA the peak, elsewhere the peak minus the value at entry; 0 before the block ends."""
        return self.peak if self.method == "cuda" else self.grown

    @property
    def grown(self) -> int:
        """Peak minus the value at entry in bytes, on every device."""
        return max(0, self.peak - self.before)

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.method == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self.before = torch.cuda.memory_allocated(self._device)
            return self
        _touch_weights(self._model)
        _trim_heap()
        self.method = "VmHWM" if _reset_high_water() else "sampling"
        self.before = _resident()
        if self.method == "sampling":
            self._sampler = _Sampler()
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._sampler is not None:
            self.peak = self._sampler.stop()
            self._sampler = None
        elif self.method == "cuda":
            torch.cuda.synchronize(self._device)
            self.peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self.peak = _high_water()


def weights_bytes(model: nn.Module) -> int:
    """Compute the bytes of a model's parameters and buffers; shared storage counts once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


class _Sampler(threading.Thread):
    """Reads resident memory every few milliseconds and keeps the largest value."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        self._peak = _resident()

    def run(self) -> None:
        while not self._done.wait(_SAMPLING_SECONDS):
            self._peak = max(self._peak, _resident())

    def stop(self) -> int:
        self._done.set()
        self.join()
        return max(self._peak, _resident())


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _high_water() -> int:
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(fields["VmHWM"].split()[0]) * 1024


def _reset_high_water() -> bool:
    """Set the kernel's high-water mark to the current value (proc_pid_clear_refs(5)); return False if that fails."""
    try:
        # opened without creation: elsewhere than on Linux the file must not come into being.
        with _CLEAR_REFS.open("r+b", buffering=0) as file:
            file.write(b"5")
        return _high_water() <= _resident() + _RESET_TOLERANCE
    except (OSError, KeyError, ValueError):
        return False


def _touch_weights(model: nn.Module) -> None:
    """Read a byte of every page of the weights, so that mapped weights are in memory."""
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu":
            of_bytes = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            of_bytes[:: mmap.PAGESIZE].sum()


def _trim_heap() -> None:
    """Give freed heap memory back to the system, so that the next block does not use it unseen (glibc only)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
