"""Rows without answers: files of texts, tables, and open text streams."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from datasets import Dataset

from lightpeft.app.tasks.rows.reading import read_file, read_json_text
from lightpeft.errors import LightPeftError, require


def read_inputs(source: Path | TextIO, column: str | None, what: str = "input") -> Dataset:
    """Rows without answers, as they are.

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
        return source.read_text(encoding="utf-8-sig") if isinstance(source, Path) else source.read()
    except UnicodeDecodeError as error:
        raise LightPeftError(f"{where} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise LightPeftError(f"{where} cannot be read: {error.strerror}") from error
