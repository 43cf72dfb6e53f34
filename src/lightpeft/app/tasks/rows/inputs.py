"""Rows without answers: files of texts, tables, and open text streams."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from datasets import Dataset

from lightpeft.app.tasks.rows.reading import read_file, read_json_text
from lightpeft.errors import LightPeftError, require


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
    while lines and not lines[-1].strip():  # a blank line between others stays, so that each line has its answer
        lines.pop()
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
