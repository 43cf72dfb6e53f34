"""Tables of any rows for people: as Markdown, and on the screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.markup import escape
from rich.table import Table

WIDE = 130
"""Characters a line from which on the screen has room for all columns."""

R = TypeVar("R")
"""What a row is made of."""


@dataclass(frozen=True)
class Column(Generic[R]):
    """One column."""

    header: str
    cell: Callable[[R], str]
    left: bool = False
    """Aligned left, as names are."""
    folded: bool = False
    """Told by the caption where it is the same in all rows."""
    wide: bool = False
    """Left out on narrow screens."""


@dataclass(frozen=True)
class Sheet(Generic[R]):
    """A table: some rows, what is shown of each, and what that means."""

    columns: Sequence[Column[R]]
    rows: Sequence[R]
    meaning: str
    """A line about the columns."""

    @property
    def shown(self) -> list[Column[R]]:
        """The columns without those that the caption tells."""
        return [column for column in self.columns if not column.folded or self._varies(column)]

    @property
    def caption(self) -> str:
        """What is the same in all rows, and what the columns mean."""
        same = [column for column in self.columns if column not in self.shown] if self.rows else []
        told = [(column.header, column.cell(self.rows[0])) for column in same]
        return ", ".join([*(f"{header} {cell}" for header, cell in told if cell != "-"), self.meaning])

    def _varies(self, column: Column[R]) -> bool:
        return len({column.cell(row) for row in self.rows}) > 1


def markdown(sheet: Sheet[R]) -> str:
    """A Markdown table with its caption below."""
    rule = ["---" if column.left else "---:" for column in sheet.shown]
    body = [[column.cell(row).replace("|", r"\|") for column in sheet.shown] for row in sheet.rows]
    lines = [f"| {' | '.join(cells)} |" for cells in ([column.header for column in sheet.shown], rule, *body)]
    return "\n".join([*lines, "", sheet.caption]) + "\n"


def rich(sheet: Sheet[R], width: int = WIDE) -> Table:
    """The table on a screen of so many characters a line."""
    table = Table(caption=escape(sheet.caption), caption_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    columns = [column for column in sheet.shown if width >= WIDE or not column.wide]
    for column in columns:
        table.add_column(escape(column.header), justify="left" if column.left else "right", no_wrap=True)
    for row in sheet.rows:
        table.add_row(*(escape(column.cell(row)) for column in columns))
    return table
