"""Which precision a run computes in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import PartialState
from workbench import Workbench

from lightpeft import machine
from lightpeft.app.runs import pipeline
from lightpeft.config import TrainingConfig
from lightpeft.errors import LightPeftError
from lightpeft.machine import autocast_dtype, has_bf16, processes


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
    assert autocast_dtype(TrainingConfig(precision="auto")) is torch.bfloat16
    assert autocast_dtype(TrainingConfig()) is None


def test_cpus_without_bfloat16(cpu: Any) -> None:
    cpu(avx2=True, avx512_f=True, avx512_bf16=False)
    assert not has_bf16()
    assert autocast_dtype(TrainingConfig(precision="auto")) is None
    assert autocast_dtype(TrainingConfig(precision="bf16")) is torch.bfloat16  # what a user asks for is done


@pytest.mark.parametrize("native", [True, False])
def test_a_run_says_where_bfloat16_is_slow(cpu: Any, tmp_path: Path, native: bool) -> None:
    cpu(avx512_bf16=native)
    work = pipeline.prepare(
        Workbench(tmp_path, "bert", "classification").config(**{"training.precision": "bf16", "method": "plain"})
    )
    pipeline.train(work)
    notes = [entry["note"] for entry in work.run.log_entries() if "note" in entry]
    slow = "training.precision: bf16 is slow on this CPU, which has no bfloat16 arithmetic; set auto or float32"
    assert [note for note in notes if "bf16" in note] == ([] if native else [slow])


# -- what launchers left behind ----------------------------------------------------------------------------------


LEFT_OVER = [
    {"WORLD_SIZE": "2"},
    {"LOCAL_RANK": "0"},
    {"WORLD_SIZE": "many", "RANK": "0"},
    {"WORLD_SIZE": "2", "RANK": "x", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"},
    {"PMI_SIZE": "3", "PMI_RANK": "1"},
]


@pytest.fixture
def alone() -> Iterator[None]:
    """accelerate has not looked for other processes yet; what it writes into the environment meanwhile goes again."""
    PartialState._reset_state()
    with mock.patch.dict(os.environ):
        yield
    PartialState._reset_state()


@pytest.mark.parametrize("left", LEFT_OVER, ids=str)
def test_variables_of_another_job(alone: None, monkeypatch: pytest.MonkeyPatch, left: dict[str, str]) -> None:
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LightPeftError, match="say that this process is one of several") as caught:
        processes()
    assert "unset variables left over" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert next(iter(left)) in str(caught.value)
