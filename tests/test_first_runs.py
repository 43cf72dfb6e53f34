"""The benchmark of first runs, end to end on a tiny model: its data, that it goes on, and what its table says."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import first_runs
import pytest
import workbench
from first_runs import Cell
from workbench import labelled, read, stamps


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for results, with ratings that need no package: sixty texts of each source."""
    rated = [(name, labelled(60, seed=number)) for number, name in enumerate(first_runs.SOURCES)]
    monkeypatch.setattr(first_runs, "ratings", lambda: iter(rated))
    return tmp_path / "out"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workbench, "POSITIONS", 128)  # room for data.max_length
        return workbench.save_base(tmp_path_factory.mktemp("first_runs") / "base")


def test_what_is_done_is_not_run_again(out: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [
        Cell("movies", 40, epochs=8),
        Cell("eight", 40, "plain", 1e-2, 8),
        Cell("movies", 40, epochs=8, estimation=4),
    ]
    monkeypatch.setattr(first_runs, "QUESTIONS", {"some": lambda: [*cells, Cell("cola", 40)]})
    arguments = ["--questions", "some", "--model", str(base), "--out", str(out)]
    assert first_runs.main(arguments) == 0
    found = read(out / "results.json")["cells"]
    assert [each["data"] for each in found] == ["movies", "eight", "movies"]  # without --glue no cola
    assert [each["settled"] for each in found] == [{"learning_rate": rate, "epochs": 8} for rate in (1e-3, 1e-2, 1e-3)]
    assert [each["steps"] for each in found] == [16, 16, 16]
    assert found[1]["scored_examples"] is None and 40 <= found[2]["scored_examples"] <= 64
    before = stamps(out / "cells")
    assert first_runs.main(arguments) == 0 and stamps(out / "cells") == before
    cells.append(Cell("movies", 40, "full", epochs=1))
    assert first_runs.main(arguments) == 0
    assert len(read(out / "results.json")["cells"]) == 4 and stamps(out / "cells").items() > before.items()


def test_a_users_own_file(out: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run as in docs/shell.md holds out a fifth of its file; what is published is of further rows."""
    monkeypatch.setattr(first_runs, "QUESTIONS", {"own": lambda: [Cell("movies", 40, epochs=64, ratio=0.5)]})
    assert first_runs.main(["--questions", "own", "--model", str(base), "--out", str(out)]) == 0
    (found,) = read(out / "results.json")["cells"]
    assert len(rows_of(out / "data" / "movies.own.csv")) == 40
    assert found["steps"] == 64 and found["scored_examples"] > 256  # 32 rows train, a step each epoch
    further = len(rows_of(out / "data" / "movies.test.csv"))
    assert found["accuracy"] * further == pytest.approx(round(found["accuracy"] * further))
    config = first_runs.settings(Cell("movies", 40, ratio=0.5), str(base), out / "data", out / "run")
    assert config["light"] == {"heads": 0.5, "neurons": 0.5} and "test" not in config["data"]


def test_data_sets(out: Path, tmp_path: Path) -> None:
    rte: list[dict[str, Any]] = [{"sentence1": f"a{i}", "sentence2": "b", "label": i % 2, "idx": i} for i in range(700)]
    for split in ("train", "validation"):
        file = tmp_path / "glue" / "rte" / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rte))
        for task in ("sst2", "cola"):
            (tmp_path / "glue" / task).mkdir(exist_ok=True)
            (tmp_path / "glue" / task / file.name).write_text('{"sentence": "a", "label": 1}\n')
    first_runs.make_data(out, tmp_path / "glue")
    eight = rows_of(out / "eight.train.csv") + rows_of(out / "eight.test.csv")
    assert {row["label"] for row in eight} == {
        f"{source} {rated}" for source in first_runs.SOURCES for rated in ("positive", "negative")
    }
    assert len(eight) == 4 * 60
    assert len(rows_of(out / "rte.train.csv")) == 700 and len(rows_of(out / "rte.test.csv")) == first_runs.TEST_ROWS
    assert rows_of(out / "rte.train.csv")[0].keys() == {"sentence1", "sentence2", "label"}
    assert 0.5 <= first_runs.majority(out / "rte.test.csv") < 0.6


def test_near_neutral_ratings_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "rated.txt").write_text('1\t0.24\t"nothing\n2\t0.25\tfine\n3\t-3.9\tbad\t', encoding="utf-8")
    with pytest.raises(ValueError, match="unpack"):  # a column more
        list(first_runs.rated_rows(tmp_path / "rated.txt"))
    (tmp_path / "rated.txt").write_text('1\t0.24\t"nothing\n2\t0.25\tfine\n3\t-3.9\tbad', encoding="utf-8")
    assert [row["label"] for row in first_runs.rated_rows(tmp_path / "rated.txt")] == ["positive", "negative"]


@pytest.mark.parametrize("question", first_runs.QUESTIONS)
def test_cells_have_names_of_their_own(question: str) -> None:
    cells = first_runs.QUESTIONS[question]()
    assert len({cell.name for cell in cells}) == len(cells)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
