"""Fields of `TrainingArguments` from YAML and the shell; trackers see one training, with the cut as an event."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lanes import thorough
from workbench import Workbench, lightpeft, read

from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.workspace import prepare
from lightpeft.plans.prune_plan import PrunePlan


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("trackers"))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show: tag -> steps and values."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_from_the_shell(bench: Workbench) -> None:
    file = bench.yaml("board", **{"trainer.report_to": "tensorboard", "trainer.logging_steps": 2})
    assert lightpeft("run", "--config", file) == 0
    (events,) = (bench.folder / "board" / "tensorboard").iterdir()
    found = scalars(events.parent)
    assert [step for step, _ in found["train/loss"]] == list(range(2, 26, 2)), "one training, through the cut"
    report = read(bench.folder / "board" / "metrics.json")["parameters"]
    assert found["train/light/base_parameters_before"] == [(6, report["base_dense"])]
    assert found["train/light/base_parameters_after"] == [(6, report["base"])]
    RunFolder.open(bench.config("board", seed=1), overwrite=True).start_anew()
    assert not (bench.folder / "board" / "tensorboard").exists(), "it would be mixed with that of the next run"


@thorough
def test_trackio_from_python(bench: Workbench, tmp_path: Path) -> None:
    """In a process of its own: it keeps threads and a data base."""
    pytest.importorskip("trackio")
    settings = bench.settings(
        "trackio",
        **{
            "light.estimate.length": 4,
            "trainer.logging_steps": 2,
        },
    )
    settings["trainer"] |= {"report_to": "trackio", "project": "lightpeft-test"}
    code = (
        "import json, sys\n"
        "from lightpeft.config import run_config_from_dict\n"
        "from lightpeft.app.runs import pipeline\n"
        "pipeline.run(run_config_from_dict(json.loads(sys.argv[1])))\n"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read(bench.folder / "trackio" / "metrics.json")["metrics"]
    (file,) = tmp_path.glob("*lightpeft-test*.db")
    rows = sqlite3.connect(file).execute("select step, metrics from metrics order by step").fetchall()
    logged = [(step, json.loads(metrics)) for step, metrics in rows]
    losses = [entry["train/loss"] for _, entry in logged if "train/loss" in entry]
    assert len(losses) == 12
    (cut,) = [entry for _, entry in logged if "train/light/base_parameters_after" in entry]
    assert cut["train/light/base_parameters_after"] < cut["train/light/base_parameters_before"]


def test_a_tracker_that_is_not_there(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    assert lightpeft("run", "--config", bench.yaml("nobody", **{"trainer.report_to": "nobody"})) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nobody" in error
    assert not (bench.folder / "nobody").exists()
    assert lightpeft("run", "--config", bench.yaml("absent", **{"trainer.report_to": "wandb"})) == 2
    assert "requires wandb to be installed" in capsys.readouterr().err


def test_fields_take_effect(bench: Workbench) -> None:
    trainer = {"trainer.lr_scheduler_type": "constant", "trainer.optim": "sgd", "trainer.logging_steps": 1}
    pipeline.run(bench.config("fields", **trainer))
    entries = [json.loads(line) for line in (bench.folder / "fields" / "log.jsonl").read_text().splitlines()]
    assert len({entry["learning_rate"] for entry in entries if "learning_rate" in entry}) == 1
    plans = [PrunePlan.load(bench.folder / "fields" / "plan.json")]
    pipeline.run(bench.config("usual"))
    assert plans[0] != PrunePlan.load(bench.folder / "usual" / "plan.json")


def test_evaluation_on_the_way(bench: Workbench) -> None:
    """The run's own metrics, of whatever task, and the best model by one of them."""
    trainer: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    trainer |= {"metric_for_best_model": "loss"}
    changes = {f"trainer.{name}": value for name, value in trainer.items()}
    report = pipeline.run(bench.config("best", **changes))
    entries = [json.loads(line) for line in (bench.folder / "best" / "log.jsonl").read_text().splitlines()]
    found = {entry["step"]: entry for entry in entries if "eval_accuracy" in entry}
    assert list(found) == [4, 8, 12, 16, 20, 24]
    assert report["metrics"]["loss"] == pytest.approx(min(found[step]["eval_loss"] for step in (8, 12, 16, 20, 24)))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("learning_rate", 1e-3, "trainer.learning_rate is determined by training.learning_rate; set that"),
        ("num_train_epochs", 3, "trainer.num_train_epochs is determined by training.epochs"),
        ("output_dir", "elsewhere", "trainer.output_dir is set by the run itself"),
        ("lr_schedule_type", "cosine", "unknown key trainer.lr_schedule_type; did you mean trainer.lr_scheduler_type?"),
        ("lr_scheduler_type", "zigzag", "trainer.lr_scheduler_type: zigzag is not a valid SchedulerType"),
        ("load_best_model_at_end", True, "trainer.load_best_model_at_end: --load_best_model_at_end requires the save"),
        ("torch_compile", True, "torch.compile does not work with a model that is cut"),
    ],
)
def test_fields_that_cannot_be(
    bench: Workbench, capsys: pytest.CaptureFixture[str], field: str, value: Any, says: str
) -> None:
    assert lightpeft("run", "--config", bench.yaml("refused", **{f"trainer.{field}": value})) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert says in error
    assert not (bench.folder / "refused").exists()


def test_fields_are_part_of_the_run(bench: Workbench) -> None:
    pipeline.estimate(prepare(bench.config("kept")))
    changed = bench.yaml("kept", **{"trainer.optim": "sgd"})
    assert lightpeft("run", "--config", changed) == 2
