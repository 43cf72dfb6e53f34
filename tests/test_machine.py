"""Which precision a run computes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from workbench import Workbench

from lightpeft import machine, pipeline
from lightpeft.config import TrainingConfig
from lightpeft.machine import autocast_dtype, has_bf16


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the machine one without an accelerator whose CPU has the given instructions."""

    def make(**capabilities: bool) -> None:
        monkeypatch.setattr(machine, "accelerator", lambda: None)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)

    return make


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16", "bf16"])
def test_cpus_with_bfloat16(cpu: Any, instructions: str) -> None:
    cpu(avx2=True, **{instructions: True})
    assert has_bf16()
    assert autocast_dtype(TrainingConfig(bf16="auto")) is torch.bfloat16
    assert autocast_dtype(TrainingConfig()) is None


def test_cpus_without_bfloat16(cpu: Any) -> None:
    cpu(avx2=True, avx512_f=True, avx512_bf16=False)
    assert not has_bf16()
    assert autocast_dtype(TrainingConfig(bf16="auto")) is None
    assert autocast_dtype(TrainingConfig(bf16=True)) is torch.bfloat16  # what a user asks for is done


def test_gpus(cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(avx512_bf16=True)
    monkeypatch.setattr(machine, "accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert not has_bf16()  # the CPU's does not count there


@pytest.mark.parametrize("native", [True, False])
def test_a_run_says_where_bfloat16_is_slow(cpu: Any, tmp_path: Path, native: bool) -> None:
    cpu(avx512_bf16=native)
    work = pipeline.prepare(
        Workbench(tmp_path, "bert", "classification").config(**{"training.bf16": True, "method": "plain"})
    )
    pipeline.train(work)
    notes = [entry["note"] for entry in work.run.log_entries() if "note" in entry]
    assert [note for note in notes if "bf16" in note] == (
        [] if native else ["training.bf16 is slow here, without bfloat16 arithmetic; auto takes float32 instead"]
    )
