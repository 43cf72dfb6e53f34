"""The benchmark of runs on few rows, on a tiny model: its cells, that it goes on, and what it publishes."""

from __future__ import annotations

from pathlib import Path

import pytest
import short_runs
import workbench
from short_runs import Cell
from workbench import labeled, read, stamps


def test_cells_of_both_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of README says nothing of budget and length; a fixed budget trains to its end."""
    monkeypatch.setattr(workbench, "POSITIONS", 128)
    base, out = workbench.save_base(tmp_path / "base"), tmp_path / "out"
    rated = [(name, labeled(400, seed=number)) for number, name in enumerate(short_runs.SOURCES)]
    monkeypatch.setattr(short_runs, "ratings", lambda: iter(rated))
    cells = {
        "budgets": [Cell("budgets", "movies", 64, "light", 0.4), Cell("budgets", "movies", 64, "plain")],
        "first": [Cell("first", "movies", 280, "light"), Cell("first", "banking77", 300, "light")],
    }
    monkeypatch.setattr(short_runs, "QUESTIONS", {name: lambda name=name: iter(cells[name]) for name in cells})
    for question in cells:
        assert short_runs.main([question, "--model", str(base), "--out", str(out)]) == 0
    fixed = read(out / "cells/budgets-movies-64-light-40%-0.json")
    assert fixed["removed"] == 0.4 and fixed["stopped"] is None and fixed["steps"] == 80
    first = read(out / "cells/first-movies-280-light-0.json")
    assert "but there are 184" in first["unmeasured"]
    assert first["cpu_seconds"] > 0 and 0 < first["accuracy"] <= 1
    assert not (out / "cells/first-banking77-300-light-0.json").exists()  # its rows are in no folder that was given
    before = stamps(out / "cells")
    assert short_runs.main(["first", "--model", str(base), "--out", str(out)]) == 0 and stamps(out / "cells") == before


@pytest.mark.parametrize("question", short_runs.QUESTIONS)
def test_cells_have_names_of_their_own(question: str) -> None:
    cells = [*short_runs.QUESTIONS[question]()]
    assert len({cell.name for cell in cells}) == len(cells)


def test_near_neutral_ratings_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "rated.txt").write_text('1\t0.24\t"nothing\n2\t0.25\tfine\n3\t-3.9\tbad', encoding="utf-8")
    assert [row["label"] for row in short_runs.rated_rows(tmp_path / "rated.txt")] == ["positive", "negative"]


def test_the_task_with_eight_classes_has_rows_of_every_source() -> None:
    rows = short_runs.eight({name: labeled(60, seed=number) for number, name in enumerate(short_runs.SOURCES)})
    assert len(rows) == 4 * 60 and len({row["label"] for row in rows}) == 8
