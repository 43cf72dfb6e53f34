"""Batch sizes: from measured memory, and halved where it runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from lightpeft import batching
from lightpeft.batching import fitting_batch_size, free_memory, halving
from lightpeft.errors import LightPeftError

MIB = 2**20
ROW = 64 * MIB
"""What the model of these tests takes for a row."""


class Hungry(nn.Module):
    """Takes 64 MiB for every row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, rows: int) -> float:
        return float(torch.ones(rows * ROW // 4).sum())


def out_of_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize(("rows", "expected"), [(0.5, 1), (1.5, 1), (5, 4), (20, 16), (1000, 64)])
def test_size_follows_free_memory(monkeypatch: pytest.MonkeyPatch, rows: float, expected: int) -> None:
    model = Hungry()
    monkeypatch.setattr(batching, "free_memory", lambda _: rows * ROW / batching.SHARE)
    assert fitting_batch_size(model, lambda: model(1)) == expected


def test_a_row_that_takes_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitting_batch_size(Hungry(), lambda: None, most=32) == 32


def test_half_where_memory_runs_out() -> None:
    tried = []

    def run(size: int) -> str:
        tried.append(size)
        return f"{size} rows" if size <= 3 else out_of_memory()

    assert halving(run, 14) == "3 rows"
    assert tried == [14, 7, 3]


def test_one_row_does_not_fit() -> None:
    with pytest.raises(LightPeftError, match=r"lower data\.max_length"):
        halving(out_of_memory, 8)
    with pytest.raises(LightPeftError, match=r"lower data\.max_length"):
        fitting_batch_size(Hungry(), out_of_memory)


def test_other_errors_are_not_about_memory() -> None:
    def fail(_: int = 0) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        halving(fail, 8)
    with pytest.raises(RuntimeError, match="shapes differ"):
        fitting_batch_size(Hungry(), fail)


def test_free_memory_is_what_the_container_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_CGROUP", tmp_path)
    assert 0 < free_memory(Hungry()) <= psutil.virtual_memory().total
    (tmp_path / "memory.current").write_text(f"{3 * MIB}\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(Hungry()) > 10 * MIB
    (tmp_path / "memory.max").write_text(f"{10 * MIB}\n")
    assert free_memory(Hungry()) == 7 * MIB
    (tmp_path / "memory.max").write_text(f"{2 * MIB}\n")
    assert free_memory(Hungry()) == 0
