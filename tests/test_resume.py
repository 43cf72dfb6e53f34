"""Runs that are killed or asked to stop anywhere: the same command goes on and ends where an undisturbed run does.

Every disturbance happens at a chosen step inside a forked child, so nothing waits and nothing depends on timing.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lanes import telling
from tiny import refusal
from transformers import Trainer, TrainerCallback
from workbench import (
    Disturb,
    Workbench,
    at_step,
    before,
    checksums,
    comparable,
    in_child,
    lightpeft,
    read,
    signalling,
    stamps,
)

from lightpeft.app.runs import pipeline, trainers
from lightpeft.config import load_config
from lightpeft.files import seal
from lightpeft.training.checkpoints import last_checkpoint


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("resume"))


KILL = signalling(signal.SIGKILL)

SETTINGS: dict[str, Any] = {"light.estimate.length": 0.4, "training.save_steps": 3}
"""10 steps of estimation and 14 of training, over epochs of 8 steps: both cross an epoch, both have checkpoints."""


@pytest.fixture(scope="module")
def undisturbed(bench: Workbench) -> dict[str, Any]:
    pipeline.run(bench.config("undisturbed", **SETTINGS))
    return comparable(bench.folder / "undisturbed")


def run_disturbed(file: Path, disturb: Disturb) -> int:
    """Exit code of the run, or the negative number of the signal that killed it."""
    return in_child(disturb, "run", "--config", file)[0]


KILLS: dict[str, Disturb] = {
    "estimation": at_step(5, KILL),
    "the cut": before(trainers, "write_plan", KILL),
    "training": at_step(18, KILL),
    "evaluation": before(pipeline, "measure", KILL),
}
"""In each stage of a run, one after the other; test_faults.py kills runs at any file operation."""


def test_killed_run_goes_on_to_the_same_end(bench: Workbench, undisturbed: dict[str, Any]) -> None:
    """Plan, metrics and weights are bit-equal: batches depend on seed and epoch alone, the rest is in checkpoints."""
    file, folder = bench.yaml("killed", **SETTINGS), bench.folder / "killed"
    for stage, disturb in KILLS.items():
        assert run_disturbed(file, disturb) == -signal.SIGKILL, stage
        assert not (folder / "metrics.json").exists(), stage
    assert lightpeft("run", "--config", file) == 0
    assert comparable(folder) == undisturbed
    assert not (folder / "checkpoints").exists()


def test_resumed_run_does_not_start_over(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    file = bench.yaml("resumed", **SETTINGS)
    assert run_disturbed(file, at_step(18, KILL)) == -signal.SIGKILL
    kept = ("estimation", "plan.json", "pruned")
    before = {name: stamps(bench.folder / "resumed" / name) for name in kept}
    steps: list[int] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(state.global_step)

    pipeline.run(load_config(file), callbacks=[Watch()])
    assert steps == list(range(15, 24))
    said = capsys.readouterr().err
    assert "train: continues from step 15\n" in said and "has no effect" not in said
    pipeline.run(load_config(file))
    assert "was finished already; these are its results" in capsys.readouterr().err
    other = refusal(lambda: pipeline.run(bench.config("resumed", **SETTINGS, **{"light.remove.heads": 0.1})))
    assert f"give another output (with --estimation {bench.folder / 'resumed'} to use its scores)" in other
    assert {name: stamps(bench.folder / "resumed" / name) for name in kept} == before


@telling("method", ["plain", "full"], ["plain"])
def test_plain_lora_and_full_fine_tuning_go_on_too(bench: Workbench, method: str) -> None:
    settings = {**SETTINGS, "training.learning_rate": 1e-3}
    whole = bench.yaml(f"{method}_whole", method=method, **settings)
    assert lightpeft("run", "--config", whole) == 0
    file = bench.yaml(f"{method}_killed", method=method, **settings)
    assert run_disturbed(file, at_step(11, KILL)) == -signal.SIGKILL
    assert lightpeft("run", "--config", file) == 0
    reports = [read(bench.folder / f"{method}_{name}" / "metrics.json") for name in ("whole", "killed")]
    assert reports[0]["metrics"] == reports[1]["metrics"]
    assert [report["training"]["train"]["resumed_at"] for report in reports] == [0, 9]


STOPS: dict[str, tuple[Disturb, int | None]] = {
    "sigterm-in-estimation": (at_step(4, signalling(signal.SIGTERM), "on_step_begin"), 5),
    "sigint-in-training": (at_step(17, signalling(signal.SIGINT), "on_step_begin"), 18),
    "sigterm-in-evaluation": (before(pipeline, "measure", signalling(signal.SIGTERM)), None),
}


@pytest.mark.parametrize("name", STOPS)
def test_stopped_run_says_so_and_goes_on(bench: Workbench, undisturbed: dict[str, Any], name: str) -> None:
    disturb, checkpoint = STOPS[name]
    file = bench.yaml(name, **SETTINGS)
    code, errors = in_child(disturb, "run", "--config", file)
    assert code == 130
    assert errors.count("\n") == 1
    assert errors.startswith("lightpeft: stopped")
    assert "same command again" in errors
    if checkpoint is not None:
        folder = bench.folder / name / "checkpoints" / "train"
        assert last_checkpoint(folder) == folder / f"checkpoint-{checkpoint}"
    assert lightpeft("run", "--config", file) == 0
    assert comparable(bench.folder / name) == undisturbed


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def saying(**changes: Any) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return act


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "scheduler, empty": ("scheduler.pt", lambda path: path.write_bytes(b""), "state of optimizer and scheduler"),
    "scheduler, garbage": ("scheduler.pt", lambda path: path.write_bytes(b"x" * 99), "optimizer and scheduler"),
    "scheduler, cut short": ("scheduler.pt", cut_short, "state of optimizer and scheduler"),
    "scheduler, of something else": ("scheduler.pt", lambda path: torch.save({"x": 1}, path), "and scheduler"),
    "optimizer, cut short": ("optimizer.pt", cut_short, "state of optimizer and scheduler"),
    "optimizer, of something else": ("optimizer.pt", lambda path: torch.save([1], path), "optimizer and scheduler"),
    "random numbers, cut short": ("rng_state.pth", cut_short, "its random state cannot be read"),
    "state, empty": ("trainer_state.json", lambda path: path.write_text(""), "trainer_state.json is damaged"),
    "state, a list": ("trainer_state.json", lambda path: path.write_text("[1]"), "trainer_state.json is damaged"),
    "state, nested": ("trainer_state.json", lambda path: path.write_text("[" * 100_000), "is damaged: maximum"),
    "state, no step": ("trainer_state.json", saying(global_step="x"), "it says step 'x'"),
    "state, part of a step": ("trainer_state.json", saying(global_step=1.5), "it says step 1.5"),
    "state, too late": ("trainer_state.json", saying(global_step=10**30), "it says step 1000"),
    "scaler, garbage": ("scaler.pt", lambda path: path.write_bytes(b"x" * 99), "its gradient scaler"),
    "state, more": ("trainer_state.json", saying(zz=1), "unexpected keyword argument"),
}
"""Name -> file of a checkpoint, what happens to it, and a part of the line."""


@pytest.fixture(scope="module")
def stopped(bench: Workbench) -> Path:
    """The settings of a run that was killed behind the cut, with one checkpoint."""
    changes = {**SETTINGS, "training.save_steps": 12}
    file = bench.yaml("damaged", **changes)
    assert run_disturbed(file, at_step(13, KILL)) == -signal.SIGKILL
    return file


@pytest.mark.parametrize("name", DAMAGE)
def test_a_checkpoint_that_was_sealed_damaged(
    bench: Workbench, stopped: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checksums are right, so nobody else finds it: one line, and the run is as it was."""
    damaged, act, says = DAMAGE[name]
    run, kept = bench.folder / stopped.stem, bench.folder / f"kept-{stopped.stem}"
    if not kept.exists():
        shutil.copytree(run, kept)
    shutil.rmtree(run)
    shutil.copytree(kept, run)
    checkpoint = last_checkpoint(run / "checkpoints" / "train")
    assert checkpoint is not None
    act(checkpoint / damaged)
    seal(checkpoint)
    (run / ".lock").unlink()  # it names the process that works there
    before = checksums(run)
    capsys.readouterr()
    assert lightpeft("run", "--config", stopped) == 2
    step = checkpoint.name.removeprefix("checkpoint-")
    line = capsys.readouterr().err.removeprefix(f"train: continues from step {step}\n")
    assert line.count("\n") == 1 and says in line and "resume from an older one" in line and str(checkpoint) in line
    (run / ".lock").unlink()
    assert checksums(run) == before


def test_second_signal_stops_at_once(bench: Workbench) -> None:
    """The first one waits for the step under way; an impatient second one does not."""

    def disturb() -> None:
        step = Trainer.training_step

        def disturbed(self: Trainer, *args: Any, **options: Any) -> torch.Tensor:
            if self.state.global_step == 4:
                signalling(signal.SIGINT)()
                signalling(signal.SIGINT)()
            return step(self, *args, **options)

        Trainer.training_step = disturbed

    assert run_disturbed(bench.yaml("impatient", **SETTINGS), disturb) == 130
    folder = bench.folder / "impatient" / "checkpoints" / "train"
    assert last_checkpoint(folder) == folder / "checkpoint-3"
