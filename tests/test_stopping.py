"""Training that is told no length stops where the loss on rows that were set aside turns, and keeps the best model."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lanes import telling
from workbench import Workbench, at_step, in_child, labeled, lightpeft, read, signalling, write_rows

from lightpeft.app.folders.opening import open_result
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.checking import check
from lightpeft.app.runs.stopping import PATIENCE, loss_aside
from lightpeft.training.schedule import FEWEST_HELD, LEAST_EPOCHS, rows_held

AUTO: dict[str, Any] = {"training.epochs": "auto", "training.batch_size": 16, "training.learning_rate": 3e-3}


@given(rows=st.integers(1, 10_000), epochs=st.integers(1, 40))
def test_rows_are_set_aside_of_few_that_come_often(rows: int, epochs: int) -> None:
    held = rows_held(rows, epochs)
    assert held == 0 or (epochs > LEAST_EPOCHS and FEWEST_HELD <= held <= rows / 5)
    assert held >= rows // 10 or epochs <= LEAST_EPOCHS or rows < 5 * FEWEST_HELD


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """240 rows, a third of whose labels are wrong: who goes on learns them by heart."""
    made = Workbench(tmp_path_factory.mktemp("stopping"))
    rows, drawn = labeled(240, seed=1), random.Random(0)
    wrong = {"positive": "negative", "negative": "positive"}
    spoilt = [{**row, "label": wrong[row["label"]] if drawn.random() < 1 / 3 else row["label"]} for row in rows]
    write_rows(made.train, spoilt)
    return made


@telling("method", ["light", "plain"], ["light"])
def test_a_run_stops_early_and_keeps_the_best(
    bench: Workbench, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = bench.config(method, method=method, **AUTO)
    report = pipeline.run(config)
    told, work = report["stopped"], pipeline.prepare(config)
    assert told["rows_aside"] == 40 and len(work.train_rows) == 200 and told["of"] == work.steps == 208
    assert told["kept"] == told["step"] - PATIENCE * work.pace.steps_per_epoch < told["of"]
    said = " ".join(capsys.readouterr().err.split())
    assert "40 training rows are held out: training stops early where the loss on them rises" in said
    assert f"training stopped early at step {told['step']} of 208" in said and f"at step {told['kept']}" in said
    kept = open_result(work.run, work.task)
    assert loss_aside(work, kept, None) == pytest.approx(told["loss"], rel=1e-5)
    assert not (bench.folder / method / "checkpoints").exists()


def test_a_killed_run_stops_where_it_would_have(bench: Workbench) -> None:
    whole = pipeline.run(bench.config("light", **AUTO))
    file = bench.yaml("killed", **AUTO)
    step = whole["stopped"]["kept"] + 2
    assert in_child(at_step(step, signalling(signal.SIGKILL)), "run", "--config", file)[0] == -signal.SIGKILL
    assert lightpeft("run", "--config", file) == 0
    again = read(bench.folder / "killed/metrics.json")
    assert (again["stopped"], again["metrics"]) == (whole["stopped"], whole["metrics"])


@pytest.mark.parametrize(
    "changes", [{"training.epochs": 13}, {"trainer": {"eval_strategy": "steps", "eval_steps": 50}}], ids=str
)
def test_who_says_how_long_is_not_stopped(bench: Workbench, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = bench.config(tmp_path.name, **{**AUTO, **changes})
    work = pipeline.prepare(config)
    assert work.held_rows is None and len(work.train_rows) == 240


def test_check_says_so(bench: Workbench) -> None:
    settings = {**AUTO, "light.remove.blocks": "auto"}
    lines = list(check(pipeline.prepare(bench.config("checked", **settings))).summary())
    assert lines[0] == (
        "removes 40% of the blocks, or nothing if the loss hardly falls in estimation: a budget search needs 512 "
        "training rows, but there are 200"
    )
    assert lines[1] == "stops before the last of its 208 steps if the loss on 40 held-out rows stops falling"
