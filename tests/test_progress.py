"""How something long that is done in steps is shown."""

from __future__ import annotations

import time

import pytest

from lightpeft.console.progress import StepProgress, duration


@pytest.mark.parametrize(("seconds", "shown"), [(42.4, "42 s"), (720.0, "12 min"), (12_600.0, "3.5 h")])
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_progress_tells_rate_and_remaining_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 0.0, 600.0, 600.0, 1800.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = StepProgress(total=6, done=2, unit="cells")
    for name in ("a", "b"):
        progress.begin(name)
        progress.end(name, "accuracy 0.5000")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "[3/6] a: accuracy 0.5000; 10 min, 6 cells/h, time left: 30 min",
        "[4/6] b: accuracy 0.5000; 20 min, 4 cells/h, time left: 30 min",
    ]
