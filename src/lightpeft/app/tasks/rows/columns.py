"""Values of rows in the columns of a kind: what error lines call them, and the checks that kinds share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from lightpeft.config import TaskEntry
from lightpeft.config.validation import short_repr
from lightpeft.errors import require


def source_column(entry: TaskEntry, column: str) -> str:
    """What the data call a column of the kind; its own name where it is put together of several."""
    source = entry.columns.get(column, column)
    return column if is_template(source) else source


def is_template(source: str) -> bool:
    """Whether what a column comes from is a template rather than a column's name."""
    return "{" in source


def place(what: str, number: int, column: str) -> str:
    """How error lines name a value: `number` counts from 1."""
    return f'{what} row {number} (the header not counted), column "{column}"'


def values(rows: Dataset, column: str, entry: TaskEntry, what: str) -> Iterator[tuple[str, Any]]:
    """The place and value of every row's `column`."""
    shown = source_column(entry, column)
    for number, value in enumerate(rows[column][:], 1):
        yield place(what, number, shown), value


HIDDEN = "fill it in, drop the row, or give a split whose answers are not hidden"
"""What to do about a row without an answer."""


def check_strings(rows: Dataset, column: str, entry: TaskEntry, what: str, blank: bool = False) -> None:
    """Raise `LightPeftError` unless `column` holds a string in every row, not blank unless allowed."""
    for where, value in values(rows, column, entry, what):
        check_text(value, where, blank)


def check_text(value: Any, where: str, blank: bool = False) -> None:
    """Raise `LightPeftError` unless a value is a string, not blank unless allowed."""
    require(value is not None, f"{where}: there is no value; fill it in or drop the row")
    require(isinstance(value, str), f"{where}: {short_repr(value)} is no text; this must be a column of strings")
    require(blank or value.strip(), f"{where}: the text is blank; fill it in or drop the row")
