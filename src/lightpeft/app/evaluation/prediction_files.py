"""Files of rows to predict on, and of what was predicted."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from datasets import Dataset

from lightpeft.app.tasks.rows.reading import read_file, read_json_text
from lightpeft.console.streams import utf8_output
from lightpeft.errors import LightPeftError, require
from lightpeft.files import replacing


def read_inputs(source: Path | TextIO, column: str | None, what: str = "input") -> Dataset:
    """Rows to predict on, as they are.

    Args:
        source: a .txt file with one text a line, a table (.csv, .tsv, .json, .jsonl, .parquet), or an open text stream:
            of texts where one column is enough, else of JSON objects.
        column: what texts are called; None: a row needs several columns, so lines of text will not do.
        what: names the source in error lines.

    Raises:
        LightPeftError: missing, empty or malformed, or texts where a table is needed.
    """
    if isinstance(source, Path) and source.suffix.lower() != ".txt":
        return read_file(source, what)
    if column is None:
        require(
            not isinstance(source, Path),
            "a row of this task has several columns, which text lines have not; "
            "give a table, or JSON lines on standard input",
        )
        return read_json_text(_content(source, what), what)
    lines = [line.rstrip("\r") for line in _content(source, what).split("\n")]
    lines = [line for line in lines if line.strip()]  # blank ones are nothing to predict on
    require(lines, f"{what} has no text: every line is blank")
    return Dataset.from_dict({column: lines})


def _content(source: Path | TextIO, what: str) -> str:
    where = f"{what} {source}" if isinstance(source, Path) else what
    try:
        if isinstance(source, Path):  # a device or a pipe might never end
            require(source.is_file() or not source.exists(), f"{where} cannot be read: it is not a regular file")
            return source.read_text(encoding="utf-8-sig")
        text = source.read()
        text.encode()
        return text
    except UnicodeEncodeError as error:
        raise LightPeftError(f"{where} is not UTF-8 text (character {error.start}); convert it to UTF-8") from error
    except UnicodeDecodeError as error:
        raise LightPeftError(f"{where} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise LightPeftError(f"{where} cannot be read: {error.strerror}") from error


def write_predictions(path: Path | None, rows: Dataset, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write rows with what was found about them; the file appears only when it is complete.

    Args:
        path: .csv or .jsonl file, replaced if it is there; None: CSV on standard output.
        rows: come first; a column that is named like a new one becomes `input_<name>`.
        columns: the new ones, one value a row.

    Raises:
        LightPeftError: another suffix, or the file or standard output cannot be written.
    """
    renamed = {name: f"input_{name}" if name in columns else name for name in rows.column_names}
    found = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    table = (
        {**{renamed[name]: value for name, value in row.items()}, **new} for row, new in zip(rows, found, strict=True)
    )
    header = [*renamed.values(), *columns]
    if path is None:
        with utf8_output() as file:
            _write_csv(file, header, table)
        return
    write = check_predictions_path(path)
    with replacing(path) as file:
        write(file, header, table)


def check_predictions_path(path: Path) -> Callable[[TextIO, list[str], Iterable[dict[str, Any]]], None]:
    """The writer for a file of predictions, by suffix; to be called before work is spent on them."""
    writer = WRITERS.get(path.suffix.lower())
    if writer is None:
        raise LightPeftError(f'predictions go to a {" or ".join(WRITERS)} file, not "{path}"')
    require(not path.is_dir(), f"predictions go to a file, and {path} is a folder; give another name")
    return writer


def _write_csv(file: TextIO, header: list[str], table: Iterable[dict[str, Any]]) -> None:
    writer = csv.DictWriter(file, header)
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in table)


def _cell(value: Any) -> Any:
    """Lists and objects as JSON, which can be read again."""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else value


def _write_jsonl(file: TextIO, header: list[str], table: Iterable[dict[str, Any]]) -> None:
    file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in table)


WRITERS: dict[str, Callable[[TextIO, list[str], Iterable[dict[str, Any]]], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
}
"""File suffix -> writer of predictions."""
