"""How many rows go through a model at once: as many as the memory at hand holds, and fewer if that was too many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from torch import nn

from lightpeft.compat.accelerate import clear_device_cache, should_reduce_batch_size
from lightpeft.profiling.memory import PeakMemory

T = TypeVar("T")

MOST_ROWS = {"cpu": 32}
"""Rows at once at most, by kind of device: a few cores are busy with that many, and more no longer fit their caches."""
MOST_ON_ACCELERATORS = 256
_SHARE = 0.5
"""Part of the free memory to plan with: allocators leave gaps, and others use the machine, too."""
_PROBE_ROWS = 4
"""Rows whose memory is measured; of a single one the noise would be too large."""
_CONTAINER_FILES = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Cgroup version 2 and 1: folder, files with the limit and the use of a container's memory, and the part of the use, in
memory.stat, that is cache and makes room when it is needed."""


def fitting_batch_size(model: nn.Module, rows: Sequence[int], compute: Callable[[Sequence[int]], object]) -> int:
    """Rows of a batch that half of the free memory holds, at least 1 and at most what `MOST_ROWS` says.

    Args:
        model: what `compute` runs, on the device that counts.
        rows: row numbers, those that need the most memory first.
        compute: runs the model on some rows; called once, with the first few.
    """
    with PeakMemory(model) as memory:
        probed, _ = next(in_batches(rows, compute, _PROBE_ROWS))
    per_row = max(1, (memory.peak - memory.before) // len(probed))
    device = next(model.parameters()).device
    fitting = int(_SHARE * free_memory(device)) // per_row
    return max(1, min(fitting, len(rows), MOST_ROWS.get(device.type, MOST_ON_ACCELERATORS)))


def in_batches(
    rows: Sequence[int], compute: Callable[[Sequence[int]], T], batch_size: int
) -> Iterator[tuple[Sequence[int], T]]:
    """What `compute` gives for all rows in turn, `batch_size` at once.

    A batch that doesn't fit into memory is halved, and so are all that follow.

    Yields:
        The rows of a batch, and what was computed for them.

    Raises:
        RuntimeError, MemoryError: a single row doesn't fit, or `compute` failed for another reason.
    """
    start = 0
    while start < len(rows):
        batch = rows[start : start + batch_size]
        try:
            result = compute(batch)
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not _out_of_memory(error):
                raise
            batch_size = len(batch) // 2
        else:
            yield batch, result
            start += len(batch)
            continue
        clear_device_cache(garbage_collection=True)  # here, where the error no longer holds on to tensors


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device; on the CPU, within the limit of a container."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    available = int(psutil.virtual_memory().available)
    return max(0, min([available, *_left_in_container()]))


def _left_in_container() -> list[int]:
    """Bytes below the limit of this container; nothing where there is none."""
    for folder, limit, used, cache in _CONTAINER_FILES:
        try:
            statistics = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
            return [_number(folder, limit) - _number(folder, used) + int(statistics.get(cache, 0))]
        except (OSError, ValueError):  # another version of cgroups, or "max": no limit
            continue
    return []


def _number(folder: str, name: str) -> int:
    return int(Path(folder, name).read_text())


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or should_reduce_batch_size(error)
