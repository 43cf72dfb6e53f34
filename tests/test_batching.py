"""Batches that fit into memory: chosen by what rows were measured to need, halved where that was too much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightpeft.app.evaluation import batching
from lightpeft.app.evaluation.batching import MOST_ROWS, fitting_batch_size, free_memory, in_batches

MIB = 2**20
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


class Hungry(nn.Module):
    """Takes so many MiB a row, for a moment."""

    def __init__(self, mib: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.mib = mib

    def forward(self, rows: Sequence[int]) -> float:
        return torch.ones(len(rows), self.mib * MIB // 4).sum().item()


@pytest.mark.parametrize(("free", "expected"), [(640, 20), (4, 1), (10**6, MOST_ROWS["cpu"])])
def test_size_is_what_half_of_the_memory_holds(monkeypatch: pytest.MonkeyPatch, free: int, expected: int) -> None:
    monkeypatch.setattr(batching, "free_memory", lambda device: free * MIB)
    model = Hungry(16)
    assert fitting_batch_size(model, range(1000), model) == pytest.approx(expected, rel=0.1)


def test_size_is_at_most_the_number_of_rows() -> None:
    model = Hungry(1)
    assert fitting_batch_size(model, range(3), model) == 3


def test_a_probe_that_does_not_fit_is_halved() -> None:
    memory = Memory(room=1)
    assert fitting_batch_size(Hungry(1), range(100), memory) >= 1
    assert memory.asked == [4, 2, 1]


def test_free_memory_keeps_to_a_container_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(name: str, value: str) -> None:
        (tmp_path / name).write_text(f"{value}\n")

    monkeypatch.setattr(batching, "_CONTAINER_FILES", ((str(tmp_path), "memory.max", "memory.current", "cached"),))
    device = torch.device("cpu")
    assert free_memory(device) > 64 * MIB
    write("memory.current", f"{48 * MIB}")
    write("memory.stat", f"anon {40 * MIB}\ncached {8 * MIB}")
    write("memory.max", "max")
    assert free_memory(device) > 64 * MIB
    write("memory.max", f"{64 * MIB}")
    assert free_memory(device) == 24 * MIB  # what is cached makes room
    write("memory.max", f"{32 * MIB}")
    assert free_memory(device) == 0
