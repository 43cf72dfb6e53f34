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
from test_pipeline import comparable
from transformers import Trainer, TrainerCallback
from workbench import Disturb, Workbench, at_step, before, checksums, in_child, lightpeft, read, signalling, stamps

from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs import pipeline, stages, trainers
from lightpeft.config import load_config
from lightpeft.files import seal
from lightpeft.plans.records import EstimationRecord, PrunePlan
from lightpeft.prune.estimation import Estimator
from lightpeft.prune.light_model import LightModel
from lightpeft.training.checkpoints import last_checkpoint


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("resume"))


KILL = signalling(signal.SIGKILL)

SETTINGS: dict[str, Any] = {"light.length": 0.4, "training.save_steps": 3}
"""10 steps of estimation and 14 of training, over epochs of 8 steps: both cross an epoch, both have checkpoints."""


@pytest.fixture(scope="module")
def undisturbed(bench: Workbench) -> dict[str, Any]:
    pipeline.run(bench.config("undisturbed", **SETTINGS))
    return comparable(bench.folder / "undisturbed")


def run_disturbed(file: Path, disturb: Disturb) -> int:
    """Exit code of the run, or the negative number of the signal that killed it."""
    return in_child(disturb, "run", "--config", file)[0]


KILLS: dict[str, dict[str, Disturb]] = {
    "in estimation": {
        "before any checkpoint": at_step(2, KILL),
        "after a checkpoint": at_step(5, KILL),
        "while a checkpoint is written": before(Trainer, "_save_optimizer_and_scheduler", KILL, 2),
        "before its state is written": before(Estimator, "save_state", KILL),
        "in its second epoch": at_step(9, KILL, "on_step_begin"),
        "over but not saved": before(EstimationRecord, "save", KILL),
    },
    "at the cut": {
        "between estimation and plan": before(trainers, "leave_plan", KILL),
        "planned but not saved": before(PrunePlan, "save", KILL),
        "between plan and pruning": before(pipeline, "leave_pruned", KILL),
        "pruned but not saved": before(LightModel, "save_pretrained", KILL),
        "before any checkpoint of training": at_step(11, KILL),
    },
    "at the cut, once": {"between plan and pruning": before(trainers, "leave_pruned", KILL)},
    "in training and behind it": {
        "after checkpoints": at_step(18, KILL),
        "in its second epoch": at_step(23, KILL),
        "trained but not saved": before(pipeline, "save_result", KILL),
        "trained but not noted": before(RunFolder, "_note", KILL),
        "between training and evaluation": before(pipeline, "evaluate", KILL),
        "in evaluation": before(pipeline, "measure", KILL),
        "evaluated but not reported": before(pipeline, "report", KILL),
    },
}
"""Where unlucky runs are killed, one place after the other. Estimated already, a run plans and prunes by itself."""


@pytest.mark.parametrize("name", KILLS)
def test_killed_run_goes_on_to_the_same_end(bench: Workbench, undisturbed: dict[str, Any], name: str) -> None:
    """Plan, metrics and weights are bit-equal: batches depend on seed and epoch alone, the rest is in checkpoints."""
    file = bench.yaml(name, **SETTINGS)
    for where, disturb in KILLS[name].items():
        assert run_disturbed(file, disturb) == -signal.SIGKILL, where
        assert not (bench.folder / name / "metrics.json").exists(), where
    assert lightpeft("run", "--config", file) == 0
    assert comparable(bench.folder / name) == undisturbed
    left = {path.name for path in (bench.folder / name).iterdir()}
    assert not {"checkpoints"} & left


def test_checkpoint_that_is_not_complete_is_skipped(bench: Workbench) -> None:
    file = bench.yaml("torn", **SETTINGS)
    assert run_disturbed(file, before(Trainer, "_save_optimizer_and_scheduler", KILL, 3)) == -signal.SIGKILL
    checkpoints = bench.folder / "torn" / "checkpoints" / "train"
    assert (checkpoints / "checkpoint-9").is_dir()
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-6"


def test_resumed_run_does_not_start_over(bench: Workbench) -> None:
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
    assert {name: stamps(bench.folder / "resumed" / name) for name in kept} == before


@pytest.mark.parametrize(
    "changes",
    [{"trainer.train_sampling_strategy": "random"}, {"light.ratio_every": 3}],
)
def test_resuming_is_exact_with_other_settings(bench: Workbench, changes: dict[str, Any]) -> None:
    name = "-".join(changes).replace(".", "_")
    settings = {**SETTINGS, **changes, "light.max_fraction": 0.4}
    assert lightpeft("run", "--config", bench.yaml(f"{name}_whole", **settings)) == 0
    file = bench.yaml(name, **settings)
    for disturb in (at_step(5, KILL), at_step(21, KILL)):
        assert run_disturbed(file, disturb) == -signal.SIGKILL
    assert lightpeft("run", "--config", file) == 0
    assert comparable(bench.folder / name) == comparable(bench.folder / f"{name}_whole")


@pytest.mark.parametrize("method", ["plain", "full"])
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
    "sigterm-in-the-last-step-of-estimation": (at_step(9, signalling(signal.SIGTERM), "on_step_begin"), 10),
    "sigterm-in-evaluation": (before(pipeline, "measure", signalling(signal.SIGTERM)), None),
    "sigint-while-pruning": (before(stages, "cut", signalling(signal.SIGINT)), None),
}


@pytest.mark.parametrize("name", STOPS)
def test_stopped_run_says_so_and_goes_on(bench: Workbench, undisturbed: dict[str, Any], name: str) -> None:
    disturb, checkpoint = STOPS[name]
    file = bench.yaml(name, **SETTINGS)
    code, errors = in_child(disturb, "run", "--config", file)
    assert code == 130
    assert errors.count("\n") == 1
    assert errors.startswith("lightpeft: stopped")
    assert "same command goes on" in errors
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
    "random numbers, cut short": ("rng_state.pth", cut_short, "its random numbers cannot be read"),
    "state, empty": ("trainer_state.json", lambda path: path.write_text(""), "trainer_state.json is damaged"),
    "state, a list": ("trainer_state.json", lambda path: path.write_text("[1]"), "trainer_state.json is damaged"),
    "state, nested": ("trainer_state.json", lambda path: path.write_text("[" * 100_000), "is damaged: maximum"),
    "state, no step": ("trainer_state.json", saying(global_step="x"), "global_step is 'x'"),
    "state, part of a step": ("trainer_state.json", saying(global_step=1.5), "it is of step 1.5"),
    "state, too late": ("trainer_state.json", saying(global_step=10**30), "it is of step 1000"),
    "state, no number": ("trainer_state.json", saying(epoch=float("nan")), "epoch is nan"),
    "state, no rows": ("trainer_state.json", saying(train_batch_size="x"), "train_batch_size is 'x'"),
    "state, no log": ("trainer_state.json", saying(log_history=[5]), "an entry of log_history is no table"),
    "state, more": ("trainer_state.json", saying(zz=1), "unexpected keyword argument"),
}
"""Name -> file of a checkpoint, what happens to it, and a part of the line."""


@pytest.fixture(scope="module", params=["light", "plain"])
def stopped(bench: Workbench, request: pytest.FixtureRequest) -> Path:
    """The settings of a run that was killed behind the cut, with one checkpoint."""
    changes = {**SETTINGS, "method": request.param, "training.save_steps": 12}
    file = bench.yaml(f"damaged-{request.param}", **changes)
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
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and says in line and "go on from an older one" in line and str(checkpoint) in line
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
