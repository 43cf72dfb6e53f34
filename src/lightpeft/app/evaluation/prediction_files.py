"""Files with rows to predict on, and files with predictions."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
from datasets import Dataset

from lightpeft.app.tasks.rows.reading import read_file, read_json_text
from lightpeft.errors import LightPeftError, require
from lightpeft.files import replacing


def read_inputs(source: Path | TextIO, column: str | None, what: str = "input") -> Dataset:
    """Read rows to predict on.

    Args:
        source: a .txt file with one text per line, a table (.csv, .tsv, .json, .jsonl, .parquet), or an open text
            stream of texts (if `column` is given) or JSON objects.
        column: name of the column for lines of text; None: a row needs several columns, so a table is required.
        what: names the source in error messages.

    Raises:
        LightPeftError: the source is missing, empty or malformed, or has lines of text where a table is required.
    """
    if isinstance(source, Path) and source.suffix.lower() != ".txt":
        return read_file(source, what)
    if column is None:
        require(
            not isinstance(source, Path),
            f"{what} {source} has lines of text, but rows of this task have several columns; "
            "give a table, or JSON lines on standard input",
        )
        return read_json_text(_read_content(source, what), what)
    lines = [line.rstrip("\r") for line in _read_content(source, what).split("\n")]
    lines = [line for line in lines if line.strip()]  # a blank line has nothing to predict
    require(lines, f"{what} has no text, only blank lines; give one text per line")
    return Dataset.from_dict({column: lines})


def _read_content(source: Path | TextIO, what: str) -> str:
    where = f"{what} {source}" if isinstance(source, Path) else what
    try:
        return source.read_text(encoding="utf-8-sig") if isinstance(source, Path) else source.read()
    except UnicodeDecodeError as error:
        raise LightPeftError(f"{where} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise LightPeftError(f"{where} cannot be read: {error.strerror}") from error


def write_predictions(path: Path | None, rows: Dataset, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write rows with their predictions; the file appears only when it is complete.

    Args:
        path: .csv or .jsonl file, which is replaced if it exists; None: CSV on standard output.
        rows: the input rows, whose columns come first; one with the name of a new column becomes `input_<name>`.
        columns: the new columns, one value per row.

    Raises:
        LightPeftError: the suffix is another one, or the file cannot be written.
    """
    given = {f"input_{name}" if name in columns else name: rows[name][:] for name in rows.column_names}
    table = pd.DataFrame({**given, **columns}, dtype=object)
    if path is None:
        _write_csv(table, sys.stdout)
        return
    check_predictions_path(path)
    with replacing(path) as file:
        if path.suffix.lower() == ".csv":
            _write_csv(table, file)
        else:
            options = {"lines": True, "force_ascii": False, "double_precision": 15, "default_handler": str}
            table.to_json(file, orient="records", **options)


def check_predictions_path(path: Path) -> None:
    """Raise `LightPeftError` unless predictions can be written to `path`; call it before the work."""
    fits = path.suffix.lower() in (".csv", ".jsonl")
    require(fits, f'predictions file "{path}" has an unknown suffix; use .csv or .jsonl')
    require(not path.is_dir(), f"predictions file {path} is a folder; give another name")


def _write_csv(table: pd.DataFrame, file: TextIO) -> None:
    table.map(_cell).to_csv(file, index=False)


def _cell(value: Any) -> Any:
    """Return lists and objects as JSON, which can be parsed again; other values unchanged."""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else value
