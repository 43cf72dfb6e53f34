"""How many rows go through a model at once, and fewer if that was too many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from lightpeft.compat.accelerate import clear_device_cache, should_reduce_batch_size

T = TypeVar("T")

_ROWS, _TOKENS = 32, 2**14
"""At once on a CPU, at most: a few cores are busy with that many rows, and more no longer fit their caches."""
_ROWS_ON_ACCELERATORS, _TOKENS_ON_ACCELERATORS = 256, 2**18


def usual_batch_size(device: torch.device, longest: int) -> int:
    """Rows of a batch, if nobody says how many.

    Args:
        longest: tokens of the longest row.
    """
    on_cpu = device.type == "cpu"
    rows, tokens = (_ROWS, _TOKENS) if on_cpu else (_ROWS_ON_ACCELERATORS, _TOKENS_ON_ACCELERATORS)
    return max(1, min(rows, tokens // max(1, longest)))


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


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or should_reduce_batch_size(error)
