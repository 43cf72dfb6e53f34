"""Runs that are killed or asked to stop anywhere: the same command goes on and ends where an undisturbed run does.

Every disturbance happens at a chosen step inside a forked child, so nothing waits and nothing depends on timing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pipeline import comparable
from transformers import Trainer, TrainerCallback
from workbench import Workbench, lightpeft, read, stamps

from lightpeft import evaluation, pipeline
from lightpeft.checkpoint import LightModel
from lightpeft.estimation import Estimator
from lightpeft.records import EstimationRecord
from lightpeft.runs import RunFolder
from lightpeft.training import last_checkpoint

Disturb = Callable[[], None]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("resume"))


SETTINGS: dict[str, Any] = {"light.length": 0.4, "training.save_steps": 3}
"""10 steps of estimation and 14 of training, over epochs of 8 steps: both cross an epoch, both have checkpoints."""


@pytest.fixture(scope="module")
def undisturbed(bench: Workbench) -> dict[str, Any]:
    pipeline.run(bench.config("undisturbed", **SETTINGS))
    return comparable(bench.folder / "undisturbed")


def in_child(work: Callable[[], int], stderr: Path | None = None) -> int:
    """Exit code of `work` in a forked process; the negative number of the signal that killed it."""

    def child() -> None:
        if stderr is not None:
            sys.stderr = stderr.open("w", encoding="utf-8", buffering=1)
        sys.exit(work())

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def send(number: int) -> None:
    os.kill(os.getpid(), number)


class SignalAt(TrainerCallback):
    """Sends a signal to its own process at one step of one stage."""

    def __init__(self, step: int, number: int, event: str = "on_step_end") -> None:
        self.step, self.number = step, number
        setattr(self, event, self._act)

    def _act(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            send(self.number)


def at_step(stage: str, step: int, number: int = signal.SIGKILL, event: str = "on_step_end") -> Disturb:
    """A signal at a step of a stage."""

    def disturb() -> None:
        make = pipeline.make_trainer

        def disturbed(*args: Any, **options: Any) -> Trainer:
            trainer = make(*args, **options)
            if options["stage"] == stage:
                trainer.add_callback(SignalAt(step, number, event))
            return trainer

        pipeline.make_trainer = disturbed

    return disturb


def before(owner: Any, name: str, number: int = signal.SIGKILL, calls: int = 1) -> Disturb:
    """A signal in place of the n-th call of a function."""

    def disturb() -> None:
        original, counted = getattr(owner, name), iter(range(1, 1000))

        def disturbed(*args: Any, **options: Any) -> Any:
            if next(counted) == calls:
                send(number)
            return original(*args, **options)

        setattr(owner, name, disturbed)

    return disturb


def run_disturbed(file: Path, disturb: Disturb, stderr: Path | None = None) -> int:
    def work() -> int:
        disturb()
        return lightpeft("run", "--config", file)

    return in_child(work, stderr)


KILLS: dict[str, Disturb] = {
    "estimation-before-any-checkpoint": at_step("estimate", 2),
    "estimation-after-a-checkpoint": at_step("estimate", 5),
    "estimation-in-its-second-epoch": at_step("estimate", 9, event="on_step_begin"),
    "estimation-while-a-checkpoint-is-written": before(Trainer, "_save_optimizer_and_scheduler", calls=2),
    "estimation-before-its-state-is-written": before(Estimator, "save_state", calls=2),
    "estimation-over-but-not-saved": before(EstimationRecord, "save"),
    "between-estimation-and-plan": before(pipeline, "plan"),
    "between-plan-and-pruning": before(pipeline, "prune"),
    "pruned-but-not-saved": before(LightModel, "save_pretrained"),
    "training-before-any-checkpoint": at_step("train", 1),
    "training-after-checkpoints": at_step("train", 8),
    "training-in-its-second-epoch": at_step("train", 13),
    "trained-but-not-saved": before(pipeline, "save_peft", calls=2),
    "trained-but-not-noted": before(RunFolder, "_note", calls=3),
    "between-training-and-evaluation": before(pipeline, "evaluate"),
    "in-evaluation": before(evaluation, "predict_logits"),
    "evaluated-but-not-reported": before(pipeline, "report"),
}


@pytest.mark.parametrize("name", KILLS)
def test_killed_run_goes_on_to_the_same_end(bench: Workbench, undisturbed: dict[str, Any], name: str) -> None:
    """Plan, metrics and weights are bit-equal: batches depend on seed and epoch alone, the rest is in checkpoints."""
    file = bench.yaml(name, **SETTINGS)
    assert run_disturbed(file, KILLS[name]) == -signal.SIGKILL
    assert not (bench.folder / name / "metrics.json").exists()
    assert lightpeft("run", "--config", file) == 0
    assert comparable(bench.folder / name) == undisturbed
    left = {path.name for path in (bench.folder / name).iterdir()}
    assert not {"checkpoints"} & left


def test_run_killed_over_and_over_comes_to_the_same_end(bench: Workbench, undisturbed: dict[str, Any]) -> None:
    file = bench.yaml("unlucky", **SETTINGS)
    for disturb in (at_step("estimate", 4), at_step("estimate", 7), at_step("train", 4), at_step("train", 11)):
        assert run_disturbed(file, disturb) == -signal.SIGKILL
    assert lightpeft("run", "--config", file) == 0
    assert comparable(bench.folder / "unlucky") == undisturbed


def test_checkpoint_that_is_not_complete_is_skipped(bench: Workbench) -> None:
    file = bench.yaml("torn", **SETTINGS)
    assert run_disturbed(file, before(Trainer, "_save_optimizer_and_scheduler", calls=3)) == -signal.SIGKILL
    checkpoints = bench.folder / "torn" / "checkpoints" / "estimate"
    assert (checkpoints / "checkpoint-9").is_dir()
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-6"


def test_resumed_run_does_not_start_over(bench: Workbench) -> None:
    file = bench.yaml("resumed", **SETTINGS)
    assert run_disturbed(file, at_step("train", 8)) == -signal.SIGKILL
    kept = ("estimation", "plan.json", "pruned")
    before = {name: stamps(bench.folder / "resumed" / name) for name in kept}
    steps: list[int] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(state.global_step)

    make = pipeline.make_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "make_trainer", lambda *a, **o: make(*a, **{**o, "callbacks": [Watch()]}))
        assert lightpeft("run", "--config", file) == 0
    assert steps == list(range(6, 14))
    assert {name: stamps(bench.folder / "resumed" / name) for name in kept} == before


@pytest.mark.parametrize("changes", [{"training.by_length": False}, {"light.length": "auto", "light.check_every": 2}])
def test_resuming_is_exact_with_other_settings(bench: Workbench, changes: dict[str, Any]) -> None:
    name = "-".join(changes).replace(".", "_")
    settings = {**SETTINGS, **changes, "light.max_fraction": 0.4}
    assert lightpeft("run", "--config", bench.yaml(f"{name}_whole", **settings)) == 0
    file = bench.yaml(name, **settings)
    for disturb in (at_step("estimate", 5), at_step("train", 11)):
        assert run_disturbed(file, disturb) == -signal.SIGKILL
    assert lightpeft("run", "--config", file) == 0
    assert comparable(bench.folder / name) == comparable(bench.folder / f"{name}_whole")


def test_plain_lora_goes_on_too(bench: Workbench) -> None:
    whole = bench.yaml("lora_whole", method="lora", **SETTINGS)
    assert lightpeft("run", "--config", whole) == 0
    file = bench.yaml("lora_killed", method="lora", **SETTINGS)
    assert run_disturbed(file, at_step("train", 11)) == -signal.SIGKILL
    assert lightpeft("run", "--config", file) == 0
    reports = [read(bench.folder / name / "metrics.json") for name in ("lora_whole", "lora_killed")]
    assert reports[0]["metrics"] == reports[1]["metrics"]


STOPS: dict[str, tuple[Disturb, int | None]] = {
    "sigterm-in-estimation": (at_step("estimate", 4, signal.SIGTERM, "on_step_begin"), 5),
    "sigint-in-training": (at_step("train", 7, signal.SIGINT, "on_step_begin"), 8),
    "sigterm-in-the-last-step-of-estimation": (at_step("estimate", 9, signal.SIGTERM, "on_step_begin"), 9),
    "sigterm-in-evaluation": (before(evaluation, "predict_logits", signal.SIGTERM), None),
    "sigint-while-pruning": (before(pipeline, "apply_plan", signal.SIGINT), None),
}


@pytest.mark.parametrize("name", STOPS)
def test_stopped_run_says_so_and_goes_on(
    bench: Workbench, undisturbed: dict[str, Any], tmp_path: Path, name: str
) -> None:
    disturb, checkpoint = STOPS[name]
    file, stderr = bench.yaml(name, **SETTINGS), tmp_path / "stderr"
    assert run_disturbed(file, disturb, stderr) == 130
    lines = stderr.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("lightpeft: stopped")
    assert "same command goes on" in lines[0]
    if checkpoint is not None:
        stage = "estimate" if "estimation" in name else "train"
        folder = bench.folder / name / "checkpoints" / stage
        assert last_checkpoint(folder) == folder / f"checkpoint-{checkpoint}"
    assert lightpeft("run", "--config", file) == 0
    assert comparable(bench.folder / name) == undisturbed


def test_second_signal_stops_at_once(bench: Workbench) -> None:
    """The first one waits for the step under way; an impatient second one does not."""

    def disturb() -> None:
        step = Trainer.training_step

        def disturbed(self: Trainer, *args: Any, **options: Any) -> torch.Tensor:
            if self.state.global_step == 4:
                send(signal.SIGINT)
                send(signal.SIGINT)
            return step(self, *args, **options)

        Trainer.training_step = disturbed

    assert run_disturbed(bench.yaml("impatient", **SETTINGS), disturb) == 130
    folder = bench.folder / "impatient" / "checkpoints" / "estimate"
    assert last_checkpoint(folder) == folder / "checkpoint-3"
