"""How many rows a forward pass takes: measured on the longest row, and halved where memory runs out all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from lightpeft.errors import LightPeftError
from lightpeft.profiling import PeakMemory

MOST = 64
"""Rows beyond which larger batches gain nothing."""
SHARE = 0.5
"""Part of the free memory that a batch may take."""
_CGROUP = Path("/sys/fs/cgroup")

T = TypeVar("T")


def fitting_batch_size(model: nn.Module, run_longest: Callable[[], Any], most: int = MOST) -> int:
    """Rows a forward pass for which half of the free memory suffices: a power of two, at least 1 and at most `most`.

    Args:
        model: where it lies, memory is looked at.
        run_longest: runs the model on the longest row alone; it is called twice.
        most: rows at most.

    Raises:
        LightPeftError: not even that row fits.
    """
    try:
        run_longest()  # the first time weights are read in and kernels chosen, which is not what a row costs
        with PeakMemory(model) as memory:
            run_longest()
    except RuntimeError as error:
        raise _too_long(error) from error
    row = max(1, memory.peak - memory.before)
    fitting = max(1, min(most, int(free_memory(model) * SHARE / row)))
    return 2 ** (fitting.bit_length() - 1)


def halving(run: Callable[[int], T], batch_size: int) -> T:
    """What `run(batch_size)` returns; where memory runs out in it, it is called again with half of that.

    Raises:
        LightPeftError: one row does not fit.
    """
    while True:
        try:
            return run(batch_size)
        except RuntimeError as error:
            if batch_size == 1 or not should_reduce_batch_size(error):
                raise _too_long(error) from error
        batch_size //= 2
        clear_device_cache(garbage_collection=True)


def free_memory(model: nn.Module) -> int:
    """Bytes that are free where the model lies: on its CUDA device, else in the process's share of main memory."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return min(psutil.virtual_memory().available, _below_limit())


def _below_limit() -> int:
    """Bytes below the limit of the process's container (cgroup v2); without a limit, as many as there are."""
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return max(0, int(limit) - int(used))
    except (OSError, ValueError):  # no cgroup v2, or the limit is the word "max"
        return psutil.virtual_memory().total


def _too_long(error: RuntimeError) -> Exception:
    """What to raise for an error: of memory one line, and any other as it is."""
    if not should_reduce_batch_size(error):
        return error
    return LightPeftError("one row alone does not fit into memory; lower data.max_length, or take a smaller model")
