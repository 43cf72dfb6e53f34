"""Values of rows in the columns of a kind: their names in error messages, and checks that kinds share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from lightpeft.config import TaskEntry
from lightpeft.config.validation import short_repr
from lightpeft.errors import require


def source_column(entry: TaskEntry, column: str) -> str:
    """Return the data's name for a column of the kind; the column's own name if a template fills it."""
    source = entry.columns.get(column, column)
    return column if is_template(source) else source


def is_template(source: str) -> bool:
    """Return True if `source` is a template, not the name of a column."""
    return "{" in source


def place(what: str, number: int, column: str) -> str:
    """Return the place of a value for error messages; `number` counts rows from 1."""
    return f'{what} row {number} (the header not counted), column "{column}"'


def values(rows: Dataset, column: str, entry: TaskEntry, what: str) -> Iterator[tuple[str, Any]]:
    """Yield the place (for error messages) and the value of every row's `column`."""
    shown = source_column(entry, column)
    for number, value in enumerate(rows[column][:], 1):
        yield place(what, number, shown), value


HIDDEN_ANSWER_REMEDY = "fill it in, drop the row, or give a split whose answers are not hidden"
"""Remedy in the error message about a row without an answer."""


def check_strings(rows: Dataset, column: str, entry: TaskEntry, what: str, blank: bool = False) -> None:
    """Raise `LightPeftError` unless `column` holds a string in every row, not blank unless allowed."""
    for where, value in values(rows, column, entry, what):
        check_text(value, where, blank)


def check_text(value: Any, where: str, blank: bool = False) -> None:
    """Raise `LightPeftError` unless a value is a string, not blank unless allowed."""
    require(value is not None, f"{where}: the value is missing; fill it in or drop the row")
    require(isinstance(value, str), f"{where}: {short_repr(value)} is not a string; use a column of strings")
    require(blank or value.strip(), f"{where}: the text is blank; fill it in or drop the row")
