"""Training through `transformers.Trainer`: steps, batches, log lines, checkpoints and signals."""

from __future__ import annotations

import json
import math
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, set_seed
from workbench import Workbench

from lightpeft.app.runs import pipeline
from lightpeft.app.runs.trainers import RunTrainer
from lightpeft.config import TrainingConfig
from lightpeft.errors import LightPeftError
from lightpeft.files import check_sealed, seal
from lightpeft.peft_kinds.placing import add_peft
from lightpeft.training.arguments import training_arguments
from lightpeft.training.callbacks import LogLines, ProgressBar, SealCheckpoint, StopOnSignal
from lightpeft.training.checkpoints import last_checkpoint
from lightpeft.training.fitting import Interrupted, run_training
from lightpeft.training.schedule import Pace

AT_RANDOM = {"train_sampling_strategy": "random"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> pipeline.Workspace:
    bench = Workbench(tmp_path_factory.mktemp("training"))
    work = pipeline.prepare(bench.config("run", **{"data.max_length": 34}))
    work.positions = 38  # no room to pad batches to a multiple of 8
    return work


def trainer_for(
    work: pipeline.Workspace, folder: Path, rows: int | None = None, seed: int = 0, given: Any = None, **settings: Any
) -> Trainer:
    config = TrainingConfig(**{"batch_size": 8, "epochs": 1, "learning_rate": 1e-2, **settings})
    data = work.train_rows if rows is None else work.train_rows.select(range(rows))
    set_seed(0)
    steps = Pace.of(len(data), config).steps(config.epochs)
    return RunTrainer(
        add_peft(work.dense_model(), replace(work.config, method="plain")),
        training_arguments(config, folder / "checkpoints", steps, seed, given),
        train_dataset=data,
        data_collator=work.collator,
        callbacks=[ProgressBar(steps), LogLines(folder / "log.jsonl"), SealCheckpoint()],
    )


class Seen(TrainerCallback):
    """Counts steps and epochs."""

    def __init__(self) -> None:
        self.steps = 0
        self.epoch = 0.0

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.steps, self.epoch = state.global_step, state.epoch or 0.0


@pytest.mark.parametrize(
    ("rows", "batch_size", "accumulation", "epochs"),
    [(64, 8, 1, 3), (61, 8, 1, 2), (61, 8, 3, 2), (7, 8, 1, 2), (5, 2, 4, 3), (33, 8, 1, 1.5), (33, 4, 2, 0.3)],
)
def test_total_steps_are_those_of_the_trainer(
    work: pipeline.Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    batch_size: int,
    accumulation: int,
    epochs: float,
) -> None:
    """`Trainer` told the epochs takes as many steps as `Pace` says, and that many steps make the epochs."""
    settings = {"batch_size": batch_size, "gradient_accumulation": accumulation, "epochs": epochs}
    steps = Pace.of(rows, TrainingConfig(**settings)).steps(epochs)
    monkeypatch.setattr(Trainer, "training_step", lambda *_, **__: torch.zeros(()))  # what counts is how often
    by_steps, by_epochs = Seen(), Seen()
    trainer = trainer_for(work, tmp_path, rows, **settings)
    trainer.add_callback(by_steps)
    trainer.train()
    assert by_steps.steps == steps
    trainer = trainer_for(work, tmp_path, rows, **settings)
    trainer.args.max_steps, trainer.args.num_train_epochs = -1, epochs
    trainer.add_callback(by_epochs)
    trainer.train()
    assert by_epochs.steps == steps
    assert by_epochs.epoch == by_steps.epoch >= epochs


# -- batches -----------------------------------------------------------------------------------------------------


def batches_of(trainer: Trainer) -> list[dict[str, torch.Tensor]]:
    return list(trainer.get_train_dataloader())


def padding(batches: list[dict[str, torch.Tensor]]) -> float:
    """Part of all positions that is padding."""
    total = sum(batch["attention_mask"].numel() for batch in batches)
    return 1 - sum(int(batch["attention_mask"].sum()) for batch in batches) / total


def test_batches_by_length_are_of_similar_length(work: pipeline.Workspace, tmp_path: Path) -> None:
    grouped = batches_of(trainer_for(work, tmp_path, batch_size=4))
    random = batches_of(trainer_for(work, tmp_path, given=AT_RANDOM, batch_size=4))
    assert padding(grouped) < 0.5 * padding(random)
    for batches in (grouped, random):
        assert sum(len(batch["labels"]) for batch in batches) == len(work.train_rows)
    spreads = [int(lengths.max() - lengths.min()) for lengths in (b["attention_mask"].sum(1) for b in grouped)]
    assert sorted(spreads)[len(spreads) // 2] <= 3


@pytest.mark.parametrize("given", [{}, AT_RANDOM], ids=["by_length", "random"])
def test_order_depends_on_seed_and_epoch_alone(work: pipeline.Workspace, tmp_path: Path, given: dict[str, str]) -> None:
    def order(seed: int, epoch: float) -> list[list[int]]:
        trainer = trainer_for(work, tmp_path, seed=seed, given=given)
        trainer.state.epoch = epoch
        loader = trainer.get_train_dataloader()
        loader.set_epoch(int(epoch))
        torch.rand(3)  # whatever else draws numbers
        return [batch["input_ids"].sum(1).tolist() for batch in loader]

    first = order(0, 0.0)
    assert order(0, 0.0) == order(0, 0.5) == first
    assert order(1, 0.0) != first
    assert order(0, 1.0) != first


# -- log ---------------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_log_lines(work: pipeline.Workspace, tmp_path: Path) -> None:
    run_training(trainer_for(work, tmp_path, given={"logging_steps": 3}), None)
    logged = lines(tmp_path / "log.jsonl")
    assert [entry["step"] for entry in logged] == [3, 6]
    for entry in logged:
        assert entry["stage"] == "train"
        assert math.isfinite(entry["loss"])
        assert entry["grad_norm"] > 0
        assert 0 <= entry["learning_rate"] <= 1e-2
    assert logged[0]["time"] < logged[1]["time"]


# -- checkpoints and signals -------------------------------------------------------------------------------------


def test_last_checkpoint_is_the_newest_complete_one(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere") is None
    for step, complete in ((9, True), (10, True), (100, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text(str(step))
        if complete:
            seal(folder)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_text("x")])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, damage: Any) -> None:
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_text(str(step))
        seal(tmp_path / f"checkpoint-{step}")
    lines: list[str] = []
    for left in (9, None):
        damage(tmp_path / f"checkpoint-{(left or 8) + 1}" / "weights")
        assert last_checkpoint(tmp_path, lines.append) == (tmp_path / f"checkpoint-{left}" if left else None)
    assert len(lines) == 2
    assert "checkpoint-10" in lines[0] and "checkpoint-9" in lines[1]
    assert all("resuming from an older checkpoint, or from the start" in line for line in lines)
    assert os.listdir(tmp_path) == [], "nobody stumbles over them again"


def test_checkpoints_are_two_at_most_and_none_at_the_end(work: pipeline.Workspace, tmp_path: Path) -> None:
    run_training(trainer_for(work, tmp_path, save_steps=2), None)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["checkpoint-4", "checkpoint-6"]  # of 8 steps
    for name in kept:
        check_sealed(tmp_path / "checkpoints" / name)


class Signal(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_signal_ends_training_with_a_checkpoint(work: pipeline.Workspace, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    trainer = trainer_for(work, tmp_path)
    trainer.add_callback(Signal(2))
    with pytest.raises(Interrupted, match="stopped at step 3; run the same command again to resume"):
        run_training(trainer, None)
    assert last_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint-3"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("act", "shown"), [(None, (8, 8)), ("signal", (3, 8)), ("stop", (3, 3))])
def test_bar_shows_where_a_stage_stopped(
    work: pipeline.Workspace, tmp_path: Path, act: str | None, shown: tuple[int, int]
) -> None:
    """Full where the stage is over, also after fewer steps than it might have taken; not where it was interrupted."""
    trainer = trainer_for(work, tmp_path)
    if act is not None:
        trainer.add_callback(Signal(2) if act == "signal" else EndAt(3))
    bar = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressBar))
    with pytest.raises(Interrupted) if act == "signal" else nullcontext():
        run_training(trainer, None)
    task = bar.progress.tasks[0]
    assert (task.completed, task.total) == shown


class EndAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_signals_in_another_thread_are_left_alone() -> None:
    import threading

    reached: list[bool] = []

    def listen() -> None:
        with StopOnSignal().listening():
            reached.append(True)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert reached == [True]


def test_error_leaves_the_terminal_in_order(
    work: pipeline.Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(work, tmp_path)
    stopped = []
    bar = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "ProgressBar")
    monkeypatch.setattr(bar.progress, "stop", lambda: stopped.append(True))
    monkeypatch.setattr(trainer, "training_step", lambda *_: (_ for _ in ()).throw(LightPeftError("bad")))
    with pytest.raises(LightPeftError, match="bad"):
        run_training(trainer, None)
    assert stopped
