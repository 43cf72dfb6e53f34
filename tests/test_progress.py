"""How something long that is done in steps is shown."""

from __future__ import annotations

import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments
from workbench import NOTICE, Workbench

from lightpeft.app.runs import pipeline
from lightpeft.console import bars
from lightpeft.console.progress import EVERY, Pulse, StepProgress, exact_duration
from lightpeft.training.callbacks import ProgressBar


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (42.4, "42 s"),
        (59.6, "1 min"),
        (130, "2 min 10 s"),
        (3599.7, "1 h"),
        (7200, "2 h"),
        (11_100, "3 h 5 min"),
    ],
)
def test_durations_of_what_is_over(seconds: float, shown: str) -> None:
    assert exact_duration(seconds) == shown


def test_progress_tells_rate_and_remaining_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 0.0, 600.0, 600.0, 1800.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = StepProgress(total=6, done=2, unit="cells")
    for name in ("a", "b"):
        progress.begin()
        progress.end(name, "accuracy 0.5000")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "2 of 6 cells are done already",
        "[3/6] a: accuracy 0.5000; 10 min, 6 cells/h, time left: 30 min",
        "[4/6] b: accuracy 0.5000; 20 min, 4 cells/h, time left: 30 min",
    ]


# -- without a terminal --------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What time it is: `clock.now`."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def test_a_line_now_and_then(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    pulse = Pulse("train", 300, "step", done=20)
    for step in range(21, 141):
        clock.now += 1.0
        pulse.beat(step, f"loss {step / 100:.4f}")
    assert capsys.readouterr().err.splitlines() == [
        "train: step 50 of 300, loss 0.5000, 1 steps/s, time left: 4 min",
        "train: step 80 of 300, loss 0.8000, 1 steps/s, time left: 4 min",
        "train: step 110 of 300, loss 1.1000, 1 steps/s, time left: 3 min",
        "train: step 140 of 300, loss 1.4000, 1 steps/s, time left: 3 min",
    ]


def test_what_is_soon_over_says_nothing(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    pulse = Pulse("Tokenizing", 10)
    pulse.beat(9)
    clock.now += EVERY - 1
    pulse.beat(10)
    assert capsys.readouterr().err == ""
    clock.now += 1
    pulse.beat(5)
    assert capsys.readouterr().err == "Tokenizing: 5 of 10, 0.167 per second, time left: 30 s\n"


def test_lines_instead_of_a_bar(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for item in bars.progress("abcd", 4, "Predicting"):
        found.append(item)
        clock.now += 40.0
    assert found == list("abcd")
    assert capsys.readouterr().err.splitlines() == [
        "Predicting: 1 of 4, 0.025 per second, time left: 2 min",
        "Predicting: 2 of 4, 0.025 per second, time left: 80 s",
        "Predicting: 3 of 4, 0.025 per second, time left: 40 s",
    ]


def trained(bar: ProgressBar, state: TrainerState, clock: SimpleNamespace, steps: int, seconds: float) -> None:
    """So many steps more, each of which takes so long."""
    given: tuple[Any, ...] = (TrainingArguments("unused", use_cpu=True), state, TrainerControl())
    for _ in range(steps):
        clock.now += seconds
        state.global_step += 1
        bar.on_step_end(*given)
        bar.on_log(*given, logs={"loss": 1 / state.global_step})


def test_training_tells_its_stage_and_the_rate_of_that(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    bar, state = ProgressBar(total=100), TrainerState(is_world_process_zero=True)
    bar.begin("estimate", 0)
    trained(bar, state, clock, 20, seconds=2.0)
    bar.begin("train", 20)
    trained(bar, state, clock, 60, seconds=0.5)
    assert capsys.readouterr().err.splitlines() == [
        "estimate: step 15 of 100, loss 0.0714, 0.5 steps/s, time left: 3 min",
        "train: step 80 of 100, loss 0.0127, 2 steps/s, time left: 10 s",
    ]


def test_one_of_several_processes_speaks(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    trained(ProgressBar(total=100), TrainerState(is_world_process_zero=False), clock, 20, seconds=20.0)
    assert capsys.readouterr().err == ""


def test_every_stage_says_in_the_end_what_it_took(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Workbench(tmp_path_factory.mktemp("progress"))
    pipeline.run(bench.config("light", **{"light.after.keep": "both", "light.after.full_width_steps": 0.25}))
    lines = [line for line in capsys.readouterr().err.splitlines() if ": done in " in line]
    assert [line.partition(":")[0] for line in lines] == ["estimate", "prune", "train", "widen", "evaluate"]
    assert all(NOTICE.match(line) and len(line) <= 80 for line in lines)
    for line, steps in zip((lines[0], *lines[2:4]), (6, 12, 6), strict=True):
        assert re.fullmatch(rf"\w+: done in [\d.]+ s, {steps} steps, [\d,]+ rows/s, peak memory [\d.,]+ [KMG]iB", line)
    pipeline.run(bench.config("light", **{"light.after.keep": "both", "light.after.full_width_steps": 0.25}))
    assert capsys.readouterr().err.endswith("light was finished already; these are its results\n")
