"""Runs of several processes that are killed: as many processes come to the same end."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lanes import thorough
from workbench import (
    ENGINES,
    Workbench,
    at_step,
    checksums,
    in_children,
    in_other_process,
    lightpeft,
    read,
    signalling,
)

from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs import pipeline
from lightpeft.plans.prune_plan import PrunePlan

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs the gloo backend")

LOST = "another process of this training has ended"
SETTINGS: dict[str, Any] = {
    "light.estimate.length": 6,
    "light.remove.heads": 0.5,
    "light.rates.dropout": 0.0,
    "peft.lora_dropout": 0.0,
    "training.learning_rate": 3e-3,
    "training.epochs": 2,
    "training.save_steps": 3,
    "trainer.logging_steps": 1,
}
"""16 steps of 8 rows, 6 of them estimation."""
OF_TWO = {"training.batch_size": 4}
"""The same steps where two processes share them."""


def killing(rank: int, step: int) -> Callable[[int], object]:
    """Kills one of several processes when it has done so many steps."""
    return lambda own: at_step(step, signalling(signal.SIGKILL))() if own == rank else None


def assert_same_end(folder: Path, undisturbed: Path) -> None:
    """Plan, loss of each step, and metrics, but for the order of sums."""
    plans = [PrunePlan.load(file) for each in (folder, undisturbed) if (file := each / "plan.json").exists()]
    assert all(plan.blocks == plans[0].blocks and plan.sites == plans[0].sites for plan in plans)
    found, expected = ({e["step"]: e["loss"] for e in _entries(each) if "loss" in e} for each in (folder, undisturbed))
    assert found.keys() >= expected.keys() - {6}  # which is logged behind the cut, or not any more
    assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-4)
    losses = [read(each / "metrics.json")["metrics"]["loss"] for each in (folder, undisturbed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def _entries(folder: Path) -> list[dict[str, Any]]:
    return list(RunFolder.at(folder).log_entries())


# -- models whose weights two processes share ----------------------------------------------------------------------


class RealBench(Workbench):
    """Runs of MiniLM over movie reviews."""

    def __init__(self, folder: Path, base: Path, reviews: Path) -> None:
        self.folder, self.base, self.task = folder, base, "classification"
        self.train, self.test = reviews / "train.csv", reviews / "test.csv"

    def settings(self, name: str = "run", **changes: Any) -> dict[str, Any]:
        rows = {"data.limit_train": 64, "data.limit_test": 16}
        return super().settings(name, **{**SETTINGS, **rows, **changes})


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, minilm: Path, movie_reviews: Path) -> RealBench:
    bench = RealBench(tmp_path_factory.mktemp("real"), minilm, movie_reviews)
    pipeline.run(bench.config("alone"))
    return bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("runs"), "llama", "causal-lm")


def run_alone(bench: Workbench) -> Path:
    """The folder of a run by one process that nothing disturbs."""
    if not (bench.folder / "alone").exists():
        pipeline.run(bench.config("alone", **SETTINGS))
    return bench.folder / "alone"


@thorough
@pytest.mark.parametrize("model", ["real", "bench"])
def test_a_launched_run_that_lost_a_process_in_training(request: pytest.FixtureRequest, model: str) -> None:
    """MiniLM, and a Llama whose heads share keys and values."""
    bench, engine = request.getfixturevalue(model), "fsdp2"
    undisturbed = run_alone(bench)
    config = bench.yaml(engine, **SETTINGS, **OF_TWO)
    launch = ["accelerate.commands.accelerate_cli", "launch", "--config_file", ENGINES / f"{engine}.yaml"]
    launch += ["--main_process_port", "0"]
    worker = Path(__file__).with_name("killed_process.py")
    # what waits for ever for the lost one does not come back in time
    done = in_other_process(*launch, worker, 11, "run", "--config", config, timeout=120)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("lightpeft: ")]
    assert LOST in line and "to resume from the last checkpoint" in line
    assert "Traceback" not in done.stderr.partition(line)[0]

    done = in_other_process(*launch, worker, -1, "run", "--config", config)
    assert done.returncode == 0, done.stderr[-12000:]
    assert_same_end(bench.folder / engine, undisturbed)


def test_a_run_that_lost_a_process_in_training(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    undisturbed, name = run_alone(bench), "lost-in-training"
    config = bench.yaml(name, **SETTINGS, **OF_TWO)
    ends = in_children(2, killing(1, 11), "run", "--config", config, engine="fsdp2")
    assert ends[0][0] == 2 and ends[1][0] == -signal.SIGKILL
    assert ends[0][1].splitlines()[-1].startswith(f"lightpeft: {LOST}") and "Traceback" not in ends[0][1]
    left = checksums(bench.folder / name)
    assert lightpeft("run", "--config", config) == 2, "by one, which takes other steps"
    assert "used a global batch of 8 rows, and this run uses 4" in capsys.readouterr().err
    assert checksums(bench.folder / name) == left
    ends = in_children(2, lambda rank: None, "run", "--config", config, engine="fsdp2")
    assert [code for code, _ in ends] == [0, 0], ends
    assert_same_end(bench.folder / name, undisturbed)


def test_an_estimation_by_other_steps_is_not_taken(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.estimate(pipeline.prepare(bench.config("donor", **SETTINGS)))
    config = bench.yaml("taker", **SETTINGS)
    for code, line in in_children(
        2, lambda rank: None, "run", "--config", config, "--estimation", bench.folder / "donor"
    ):
        assert code == 2 and "used a global batch of 8 rows, and this run uses 16" in line
    assert not (bench.folder / "taker").exists()
