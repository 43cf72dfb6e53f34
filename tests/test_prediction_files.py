"""Rows to predict on from files and streams, and files of predictions."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
from datasets import Dataset

from lightpeft.app.evaluation.prediction_files import check_predictions_path, write_predictions
from lightpeft.app.tasks.rows.inputs import read_inputs
from lightpeft.errors import LightPeftError


class TestInputs:
    def test_text_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "in.txt"
        path.write_text("first\r\n\n  \nsecond, with comma\n", encoding="utf-8")
        assert read_inputs(path, "t").to_dict() == {"t": ["first", "", "  ", "second, with comma"]}
        assert read_inputs(io.StringIO("first\nsecond\n\n"), "t").to_dict() == {"t": ["first", "second"]}

    def test_table(self, tmp_path: Path) -> None:
        path = tmp_path / "in.csv"
        path.write_text("id,a,b\n1,x,y\n", encoding="utf-8")
        for column in ("a", None):
            assert read_inputs(path, column).to_list() == [{"id": "1", "a": "x", "b": "y"}]

    def test_json_lines_where_a_row_has_several_columns(self) -> None:
        rows = [{"a": "x", "b": "y"}, {"a": "\u2028", "b": None}]
        assert read_inputs(io.StringIO("\n\n".join(map(json.dumps, rows))), None).to_list() == rows
        assert read_inputs(io.StringIO(json.dumps(rows)), None).to_list() == rows

    def test_bad_inputs(self, tmp_path: Path) -> None:
        text, latin = tmp_path / "in.txt", tmp_path / "latin.txt"
        text.write_text("x")
        latin.write_bytes("café".encode("latin-1"))
        cases: list[tuple[Any, str | None, str]] = [
            (tmp_path / "no.txt", "t", "cannot be read"),
            (tmp_path / "no.csv", "t", "does not exist"),
            (tmp_path / "no", "t", "does not exist"),
            (latin, "t", "not UTF-8"),
            (io.StringIO("\n \n"), "t", "only blank lines"),
            (text, None, "have several columns; give a table"),
            (io.StringIO("x\n"), None, "input line 1 is not JSON"),
            (io.StringIO(" \n"), None, "input has no rows"),
        ]
        for source, column, expected in cases:
            with pytest.raises(LightPeftError) as caught:
                read_inputs(source, column)
            assert expected in str(caught.value)
            assert "\n" not in str(caught.value)


class TestPredictionFiles:
    rows = Dataset.from_dict({"text": ['a, "b"', "c\nd"], "label": [1, 0], "n": [7, 8]})
    columns: ClassVar = {"label": ["yes", "no"], "p_no": [0.25, 0.9]}

    def test_csv(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "out.csv"
        write_predictions(path, self.rows, self.columns)
        with path.open(encoding="utf-8", newline="") as file:
            written = list(csv.DictReader(file))
        first = {"text": 'a, "b"', "input_label": "1", "n": "7", "label": "yes", "p_no": "0.25"}
        second = {"text": "c\nd", "input_label": "0", "n": "8", "label": "no", "p_no": "0.9"}
        assert written == [first, second]
        assert [file.name for file in path.parent.iterdir()] == ["out.csv"]

    def test_jsonl(self, tmp_path: Path) -> None:
        path = tmp_path / "out.jsonl"
        path.write_text("old", encoding="utf-8")
        write_predictions(path, self.rows, self.columns)
        written = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert written[0] == {"text": 'a, "b"', "input_label": 1, "n": 7, "label": "yes", "p_no": 0.25}
        assert [row["label"] for row in written] == ["yes", "no"]

    def test_no_column_of_the_input_is_lost(self, tmp_path: Path) -> None:
        """A file that was written before has both."""
        rows = Dataset.from_dict({"text": ["a"], "input_label": ["right"], "label": ["wrong"]})
        write_predictions(tmp_path / "out.jsonl", rows, {"label": ["no"]})
        written = {"text": "a", "input_label": "right", "input_input_label": "wrong", "label": "no"}
        assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8")) == written

    def test_unknown_suffix(self, tmp_path: Path) -> None:
        with pytest.raises(LightPeftError, match=r"\.csv or \.jsonl"):
            check_predictions_path(tmp_path / "out.xlsx")

    def test_a_full_disk_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "out.csv"
        path.write_text("old", encoding="utf-8")

        def full(*args: Any, **options: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(pd.DataFrame, "to_csv", full)
        with pytest.raises(LightPeftError, match="No space left on device"):
            write_predictions(path, self.rows, self.columns)
        assert path.read_text(encoding="utf-8") == "old"
        assert [file.name for file in tmp_path.iterdir()] == ["out.csv"]

    def test_lists_and_objects_are_json_in_a_csv(self, tmp_path: Path) -> None:
        rows = Dataset.from_dict({"options": [["é", "b"]], "answers": [{"text": ["b"]}]})
        write_predictions(tmp_path / "out.csv", rows, {"answer": ["b"]})
        with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
            assert list(csv.DictReader(file)) == [
                {"options": '["é", "b"]', "answers": '{"text": ["b"]}', "answer": "b"}
            ]
