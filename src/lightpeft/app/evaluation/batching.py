"""The number of rows in a forward pass, halved when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from lightpeft.compat.accelerate import clear_device_cache, should_reduce_batch_size
from lightpeft.errors import require

T = TypeVar("T")

_CPU_ROWS, _CPU_TOKENS = 32, 2**14
"""Most rows and tokens of a batch on a CPU: they keep a few cores busy, and more do not fit into the caches."""
_ACCELERATOR_ROWS, _ACCELERATOR_TOKENS = 256, 2**18

_CPU_PROMPTS, _CPU_COMPLETION_TOKENS = 16, 128
"""Most shared prompts, and most tokens of their completions, in a forward pass on a CPU."""


def check_batch_size(size: int | None) -> None:
    """Raise `LightPeftError` unless a batch size is at least 1, or None."""
    require(size is None or size >= 1, f"batch_size is {size}; it must be at least 1")


def usual_batch_size(device: torch.device, longest: int) -> int:
    """Return the default batch size, in rows.

    Args:
        longest: tokens of the longest row.
    """
    on_cpu = device.type == "cpu"
    rows, tokens = (_CPU_ROWS, _CPU_TOKENS) if on_cpu else (_ACCELERATOR_ROWS, _ACCELERATOR_TOKENS)
    return max(1, min(rows, tokens // max(1, longest)))


@dataclass(frozen=True)
class AtOnce:
    """Most prompts of a forward pass, and most rows and tokens of completions that go on from their KV caches."""

    prompts: int
    rows: int
    tokens: int


def completions_at_once(device: torch.device, longest: int, batch_size: int | None) -> AtOnce:
    """Return how much of shared prompts and their completions goes into a forward pass.

    On a CPU more of them together only add padding, since a completion has few tokens.

    Args:
        longest: tokens of the longest prompt with its completion.
        batch_size: most rows of a pass; None: the default of the device.
    """
    on_cpu = device.type == "cpu"
    size = batch_size or usual_batch_size(device, longest)
    if not on_cpu:
        return AtOnce(size, size, _ACCELERATOR_TOKENS)
    rows = batch_size or max(size, min(_CPU_COMPLETION_TOKENS, _CPU_TOKENS // max(1, longest)))
    return AtOnce(min(size, _CPU_PROMPTS), rows, _CPU_COMPLETION_TOKENS)


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
