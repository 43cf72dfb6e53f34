"""Training in float16, whose gradients come scaled and may overflow; on a GPU where there is one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from lanes import telling
from tiny import relative_difference
from workbench import Workbench

from lightpeft import load_light, machine
from lightpeft.app.runs import pipeline
from lightpeft.config import TrainingConfig
from lightpeft.errors import LightPeftError
from lightpeft.machine import autocast_dtype, autocasting

PRECISIONS = {"half": "fp16", "whole": "float32"}


class Scalers:
    """The gradient scalers that runs made on a CPU, and the scale they begin with; on a GPU they are accelerate's."""

    def __init__(self) -> None:
        self.first = 2.0**16
        self.made: list[torch.amp.GradScaler] = []

    def make(self) -> torch.amp.GradScaler:
        self.made.append(torch.amp.GradScaler("cpu", init_scale=self.first))
        return self.made[-1]


def logged_steps(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if "loss" in line]


@pytest.fixture
def scalers(monkeypatch: pytest.MonkeyPatch) -> Scalers:
    """Lets accelerate train in float16 on a CPU as it does on a GPU."""
    scalers = Scalers()
    create = accelerate.Accelerator.__init__

    def init(self: accelerate.Accelerator, *arguments: Any, **options: Any) -> None:
        create(self, *arguments, **options)
        if self.mixed_precision == "fp16":
            self.native_amp, self.scaler = True, scalers.make()

    if not torch.cuda.is_available():
        monkeypatch.setattr(accelerate.Accelerator, "__init__", init)
        monkeypatch.setattr(machine, "accelerator", lambda: torch.device("cpu"))
    return scalers


@telling("family", ["bert", "llama"], ["bert"])
def test_a_run_goes_as_in_float32(tmp_path: Path, family: str, scalers: Scalers) -> None:
    bench = Workbench(tmp_path, family, "classification")
    losses = []
    for name in ("half", "whole"):
        result = pipeline.run(bench.config(name, **{"training.precision": PRECISIONS[name]}))
        losses.append([result["metrics"]["loss"], *(line["loss"] for line in logged_steps(tmp_path / name))])
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    assert len(scalers.made) == (0 if torch.cuda.is_available() else 1)
    assert all(scaler.get_scale() > 1 for scaler in scalers.made)
    light = load_light(tmp_path / "half" / "adapter")
    assert {parameter.dtype for parameter in light.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", ["light", "plain", "full"])
def test_a_base_in_float16(tmp_path: Path, method: str, scalers: Scalers) -> None:
    """Its head trains in float32, which PEFT would leave in float16 and a scaler would refuse."""
    rate = {"training.learning_rate": 3e-3} if method == "full" else {}
    changes = {"training.precision": "fp16", **rate, "model.dtype": "float16", "method": method}
    result = pipeline.run(Workbench(tmp_path, "bert", "classification").config("run", **changes))
    untrained = math.log(2)
    assert result["metrics"]["loss"] < untrained - 0.02


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_scores_are_of_the_loss_before_scaling(tmp_path: Path, family: str, scalers: Scalers) -> None:
    """Of steps that change no weight, so that two runs see one model."""
    bench = Workbench(tmp_path, family, "classification")
    still = {"training.learning_rate": 1e-12, "light.estimate.mask_learning_rate": 1e-12, "light.estimate.length": 8}
    half, whole = (
        pipeline.estimate(pipeline.prepare(bench.config(name, **still, **{"training.precision": PRECISIONS[name]})))
        for name in ("half", "whole")
    )
    for kind in ("heads", "neurons"):
        found, expected = (torch.cat(record.block_scores(kind, "taylor")) for record in (half, whole))
        assert relative_difference(found, expected) < 0.02, kind


@pytest.mark.skipif(torch.cuda.is_available(), reason="the first scale is set for CPUs alone")
def test_steps_that_overflow_are_left_out(tmp_path: Path, scalers: Scalers) -> None:
    """The scaler begins too high, skips the step and halves its scale until all gradients are finite."""
    scalers.first = 2.0**24
    bench = Workbench(tmp_path, "bert", "classification")
    work = pipeline.prepare(bench.config("run", **{"training.precision": "fp16", "light.estimate.length": 16}))
    record = pipeline.estimate(work)
    (scaler,) = scalers.made
    assert 1 < scaler.get_scale() < scalers.first
    taylor = torch.cat(record.block_scores("neurons", "taylor"))
    assert torch.isfinite(taylor).all() and taylor.max() > 0
    assert record.meta["steps"] == 16


def test_without_a_gpu_training_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "accelerator", lambda: None)
    with pytest.raises(LightPeftError, match="training.precision: fp16 needs a GPU, and this machine has none"):
        pipeline.prepare(Workbench(tmp_path).config(**{"training.precision": "fp16"}))
    assert not (tmp_path / "run").exists()
    assert autocast_dtype(TrainingConfig(precision="fp16")) is None  # what a GPU trained is evaluated in float32


def test_a_gpu_computes_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "accelerator", lambda: torch.device("cuda"))
    assert autocast_dtype(TrainingConfig(precision="fp16")) is torch.float16


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_autocasting(dtype: torch.dtype | None) -> None:
    with autocasting(torch.device("cpu"), dtype):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype is (dtype or torch.float32)
