"""The number of rows in a forward pass, halved when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from lightpeft.compat.accelerate import clear_device_cache, should_reduce_batch_size

T = TypeVar("T")

_CPU_ROWS, _CPU_TOKENS = 32, 2**14
"""Most rows and tokens of a batch on a CPU: they keep a few cores busy, and more do not fit into the caches."""
_ACCELERATOR_ROWS, _ACCELERATOR_TOKENS = 256, 2**18


def usual_batch_size(device: torch.device, longest: int) -> int:
    """Return the default batch size, in rows.

    Args:
        longest: tokens of the longest row.
    """
    on_cpu = device.type == "cpu"
    rows, tokens = (_CPU_ROWS, _CPU_TOKENS) if on_cpu else (_ACCELERATOR_ROWS, _ACCELERATOR_TOKENS)
    return max(1, min(rows, tokens // max(1, longest)))


def in_batches(
    rows: Sequence[int], compute: Callable[[Sequence[int]], T], batch_size: int
) -> Iterator[tuple[Sequence[int], T]]:
    """Apply `compute` to all rows in batches of `batch_size`.

    A batch that does not fit into memory is halved, and so are all later ones.

    Yields:
        The rows of a batch, and the result of `compute` for them.

    Raises:
        RuntimeError, MemoryError: a single row does not fit, or `compute` failed for another reason.
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
        clear_device_cache(garbage_collection=True)  # only here: inside `except` the error still holds tensors


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or should_reduce_batch_size(error)
