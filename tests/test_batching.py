"""Batches that fit into memory: halved where they were too large."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightpeft.app.evaluation import batching
from lightpeft.app.evaluation.batching import in_batches, usual_batch_size

FULL = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."


@pytest.fixture(scope="module", autouse=True)
def cleared() -> Iterator[list[bool]]:
    """Calls that clear the device's cache, which takes a second of collecting garbage."""
    calls: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "clear_device_cache", lambda garbage_collection: calls.append(garbage_collection))
        yield calls


class Memory:
    """Computes batches of up to `room` rows and fails beyond, as PyTorch does; keeps what it was asked for."""

    def __init__(self, room: int, error: type[Exception] = RuntimeError, message: str = FULL) -> None:
        self.room, self.error, self.message = room, error, message
        self.asked: list[int] = []

    def __call__(self, rows: Sequence[int]) -> list[int]:
        self.asked.append(len(rows))
        if len(rows) > self.room:
            raise self.error(self.message)
        return [10 * row for row in rows]


@given(count=st.integers(0, 40), size=st.integers(1, 50), room=st.integers(1, 50))
def test_every_row_once_and_in_order_whatever_fits(count: int, size: int, room: int) -> None:
    rows, memory = list(range(count)), Memory(room)
    batches = list(in_batches(rows, memory, size))
    assert [row for batch, _ in batches for row in batch] == rows
    assert [value for _, values in batches for value in values] == [10 * row for row in rows]
    assert all(len(batch) <= room for batch, _ in batches)
    if size <= room:
        assert memory.asked == [len(batch) for batch, _ in batches]  # nothing was tried twice


def test_batches_are_halved_and_stay_so(cleared: list[bool]) -> None:
    memory = Memory(room=5)
    cleared.clear()
    assert [len(batch) for batch, _ in in_batches(range(20), memory, 16)] == [4, 4, 4, 4, 4]
    assert memory.asked == [16, 8, 4, 4, 4, 4, 4]
    assert cleared == [True, True]


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_kinds_of_running_out(error: type[Exception]) -> None:
    memory = Memory(room=2, error=error, message="CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert sum(len(batch) for batch, _ in in_batches(range(9), memory, 8)) == 9


def test_what_halving_cannot_help_is_raised() -> None:
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        list(in_batches(range(4), Memory(room=0), 4))
    memory = Memory(room=1, message="mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes"):
        list(in_batches(range(4), memory, 4))
    assert memory.asked == [4]


@pytest.mark.parametrize(
    ("device", "longest", "expected"), [("cpu", 100, 32), ("cpu", 2048, 8), ("cpu", 10**6, 1), ("cuda", 100, 256)]
)
def test_the_usual_size(device: str, longest: int, expected: int) -> None:
    assert usual_batch_size(torch.device(device), longest) == expected
