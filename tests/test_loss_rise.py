"""Warnings about a training loss that rises: real runs that unlearned, runs that did not, and what a run says."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
from lights import light_of
from training import dataset, student
from transformers import Trainer, TrainingArguments
from workbench import Workbench, lightpeft

from lightpeft import LightTrainer, light_trainer
from lightpeft.app.runs import pipeline
from lightpeft.training.loss_rise import LOWER_RATE, LossRise, loss_rise

FELL = [0.69, 0.69, 0.69, 0.67, 0.6, 0.57, 0.56, 0.54, 0.53, 0.55, 0.55, 0.61]
UNLEARNED = [*FELL, *[0.693, 0.695, 0.692] * 12, 0.64, 0.56]
"""As MiniLM with LoRA on all projections unlearned movie reviews, and did not recover in time."""


def logs(losses: list[float]) -> list[dict[str, Any]]:
    """What a trainer has logged every 10 steps, with entries of other kinds between."""
    entries: list[dict[str, Any]] = []
    for number, loss in enumerate(losses, 1):
        entries += [{"step": 10 * number, "loss": loss}, {"step": 10 * number, "eval_loss": 9.0}]
    return [*entries, {"step": 10 * len(losses), "train_loss": 0.5}]


def test_a_model_that_unlearned() -> None:
    found = loss_rise(logs(UNLEARNED))
    assert found is not None
    assert 60 <= found.low_step <= 120 < found.high_step
    assert found.low < 0.58 < 0.68 < found.high
    line = f"the training loss rose from {found.low:.3f} at step {found.low_step} to {found.high:.3f} at step"
    assert str(found).startswith(line) and str(found).endswith(LOWER_RATE)


def test_the_cut_raises_the_loss_and_does_not_count() -> None:
    before, after = [0.4] * 20, [0.7 - 0.01 * place for place in range(30)]
    assert loss_rise(logs([*before, *after])) is not None
    assert loss_rise(logs([*before, *after]), begun=200) is None


@pytest.mark.parametrize("losses", [[], [0.1] * 5 + [0.9] * 9, [0.5] * 60, [0.5, float("nan")] * 30], ids=str)
def test_too_few_losses_or_no_rise(losses: list[float]) -> None:
    assert loss_rise(logs(losses)) is None


def test_noise_is_no_rise() -> None:
    """Losses that fall by a third, with noise as of GSM8K; of 6,000 such runs 3 were warned about."""
    draw = random.Random(0)
    found = []
    for _ in range(500):
        count, noise = draw.randint(15, 200), draw.uniform(0, 0.2)
        found.append(loss_rise(logs([1 - place / count / 3 + draw.gauss(0, noise) for place in range(count)])))
    assert len(found) - found.count(None) <= 1


def test_a_run_warns_and_does_not_advise_a_higher_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate of almost 0 learns nothing, for which a higher one is advised unless the loss rose."""
    rise = LossRise(0.5, 20, 0.7, 60)
    monkeypatch.setattr(pipeline, "loss_rise", lambda logs, begun: rise)
    file = Workbench(tmp_path).yaml("run", **{"method": "plain", "training.learning_rate": 1e-9})
    assert lightpeft("run", "--config", file) == 0
    assert f"warning: {rise}\n" in capsys.readouterr().err
    warnings = json.loads((tmp_path / "run" / "metrics.json").read_text())["warnings"]
    assert str(rise) in warnings
    (doubt,) = [line for line in warnings if "majority baseline" in line or "are answered" in line]
    assert doubt.endswith(LOWER_RATE)


@pytest.mark.parametrize("own_loss", [False, True])
def test_the_trainer_warns(
    own_loss: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Unless it has a loss of its own, which may rise, as in reinforcement learning."""
    rise = LossRise(0.5, 20, 0.7, 60)
    monkeypatch.setattr("lightpeft.recipe.trainer.loss_rise", lambda logs, begun: rise if begun == 4 else None)
    trainer_class = light_trainer(type("Own", (Trainer,), {"compute_loss": _own_loss})) if own_loss else LightTrainer
    arguments = TrainingArguments(str(tmp_path), max_steps=6, report_to=[], use_cpu=True)
    trainer = trainer_class(student(), arguments, train_dataset=dataset(), light=light_of(length=4))
    with caplog.at_level(logging.WARNING, logger="lightpeft"):
        trainer.train()
    assert (str(rise) in caplog.messages) != own_loss


def _own_loss(trainer: Trainer, model: Any, batch: Any, *args: Any, **options: Any) -> Any:
    return Trainer.compute_loss(trainer, model, batch, *args, **options)
