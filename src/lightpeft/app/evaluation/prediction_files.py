"""Files with predictions."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
from datasets import Dataset

from lightpeft.errors import require
from lightpeft.files import check_no_folder, replacing


def write_predictions(path: Path | None, rows: Dataset, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write rows with their predictions; the file appears only when it is complete.

    Args:
        path: .csv or .jsonl file, which is replaced if it exists; None: CSV on standard output.
        rows: the input rows, whose columns come first; one with the name of a new column becomes `input_<name>`.
        columns: the new columns, one value per row.

    Raises:
        LightPeftError: the suffix is another one, or the file cannot be written.
    """
    taken = {*columns, *rows.column_names}
    given = {_free_name(name, taken) if name in columns else name: rows[name][:] for name in rows.column_names}
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


def _free_name(name: str, taken: Set[str]) -> str:
    """Return a name with as many `input_` before it as it takes to be a new one."""
    return _free_name(f"input_{name}", taken) if name in taken else name


def check_predictions_path(path: Path) -> None:
    """Raise `LightPeftError` unless predictions can be written to `path`; call it before the work."""
    fits = path.suffix.lower() in (".csv", ".jsonl")
    require(fits, f'predictions file "{path}" has an unknown suffix; use .csv or .jsonl')
    check_no_folder(path, "predictions file")


def _write_csv(table: pd.DataFrame, file: TextIO) -> None:
    table.map(_cell).to_csv(file, index=False)


def _cell(value: Any) -> Any:
    """Return lists and objects as JSON, which can be parsed again; other values unchanged."""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else value
