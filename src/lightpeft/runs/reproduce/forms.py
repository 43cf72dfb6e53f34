"""Tables of any rows for people: as Markdown, as LaTeX, and on the screen."""

from __future__ import annotations

import re
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
    parted: Callable[[R], object] = lambda row: None
    """Between rows in which this differs a rule is drawn, where the form has rules."""

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


def latex(sheet: Sheet[R]) -> str:
    """A LaTeX table (packages booktabs and graphicx)."""
    lines = []
    for before, row in zip([None, *sheet.rows], sheet.rows, strict=False):
        if before is not None and sheet.parted(before) != sheet.parted(row):
            lines.append(r"\midrule")
        lines.append(" & ".join(escaped(column.cell(row)) for column in sheet.shown) + r" \\")
    return "\n".join(
        [
            r"\begin{table*}",
            r"\centering",
            r"\setlength{\belowcaptionskip}{1ex}",
            rf"\caption{{{escaped(sheet.caption)}}}",
            r"\resizebox{\linewidth}{!}{%",
            rf"\begin{{tabular}}{{{''.join('l' if column.left else 'r' for column in sheet.shown)}}}",
            r"\toprule",
            " & ".join(_stacked(column.header) for column in sheet.shown) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table*}",
            "",
        ]
    )


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "<": "$<$",
    ">": "$>$",
    "|": r"$|$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
_SIGN = re.compile(r"(?<![^\[ ])([-+])(?=\d)")
"""Of a number, or of an end of an interval."""


def _stacked(header: str) -> str:
    """A header with one word a line, so that its column is narrow."""
    lines = r"\\".join(escaped(word) for word in header.split())
    return rf"\shortstack{{{lines}}}" if " " in header else lines


def escaped(text: str) -> str:
    """Text as LaTeX shows it: special characters escaped, the sign of a number as long as a minus sign is."""
    texts = _SIGN.split(text)  # a sign in every second place
    texts[::2] = ["".join(_LATEX.get(character, character) for character in part) for part in texts[::2]]
    texts[1::2] = [f"${sign}$" for sign in texts[1::2]]
    return "".join(texts)


def rich(sheet: Sheet[R], width: int = WIDE) -> Table:
    """The table on a screen of so many characters a line."""
    table = Table(caption=escape(sheet.caption), caption_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    columns = [column for column in sheet.shown if width >= WIDE or not column.wide]
    for column in columns:
        table.add_column(escape(column.header), justify="left" if column.left else "right", no_wrap=True)
    for row in sheet.rows:
        table.add_row(*(escape(column.cell(row)) for column in columns))
    return table
