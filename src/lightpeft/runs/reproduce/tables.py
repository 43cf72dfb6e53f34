"""A grid's results as JSON, CSV, Markdown and LaTeX, and on the screen."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from lightpeft.files import write_json, write_text
from lightpeft.profiling import versions
from lightpeft.runs.reproduce.summary import MEASURES, UNBOUNDED, Results, Row, Spread, spread

_MIB = 2**20


@dataclass(frozen=True)
class Column:
    """One column for people."""

    header: str
    cell: Callable[[Row], str]
    left: bool = False
    """Aligned left, as names are."""
    folded: bool = False
    """Told by the caption where it is the same in all rows."""
    wide: bool = False
    """Left out on narrow screens."""


def _plus_minus(values: Spread | None, form: str, factor: float = 1.0) -> str:
    """Mean and standard deviation; "-" where there is nothing."""
    if values is None:
        return "-"
    mean = f"{factor * values.mean:{form}}"
    return mean if values.std is None else f"{mean} ± {factor * values.std:{form.lstrip('+')}}"


def _factor(row: Row) -> float:
    return 1.0 if row.metric in UNBOUNDED else 100.0


def _difference(row: Row) -> str:
    return "-" if row.difference is None else _plus_minus(spread(row.difference), "+.1f", _factor(row))


def _p(row: Row) -> str:
    if row.p is None:
        return "-"
    return "<0.001" if row.p < 0.001 else f"{row.p:.3f}"


def count(number: float | None) -> str:
    """A number of parameters: all digits while they are few, then in millions or billions."""
    if number is None:
        return "-"
    if number < 1e6:
        return f"{number:,.0f}"
    return f"{number / 1e6:.1f}M" if number < 1e9 else f"{number / 1e9:.2f}B"


def _mean(row: Row, measure: str) -> float | None:
    values = row.measures[measure]
    return None if values is None else values.mean


def _mean_text(row: Row, measure: str, form: str, factor: float = 1.0) -> str:
    value = _mean(row, measure)
    return "-" if value is None else f"{factor * value:{form}}"


COLUMNS = (
    Column("model", lambda row: row.model, left=True, folded=True),
    Column("task", lambda row: row.task, left=True, folded=True),
    Column("method", lambda row: row.method, left=True),
    Column("metric", lambda row: row.metric, left=True, folded=True),
    Column("seeds", lambda row: str(len(row.seeds)), folded=True),
    Column("quality", lambda row: _plus_minus(spread(row.quality), ".1f", _factor(row))),
    Column("difference", _difference),
    Column("p", _p, wide=True),
    Column("full width", lambda row: _plus_minus(row.measures["full_width"], ".1f", _factor(row)), folded=True),
    Column("parameters", lambda row: count(_mean(row, "parameters")), wide=True),
    Column("removed, %", lambda row: _mean_text(row, "removed", ".1f", 100.0)),
    Column("trained", lambda row: count(_mean(row, "trained"))),
    Column("adapter KiB", lambda row: _mean_text(row, "adapter_bytes", ",.0f", 1 / 1024), wide=True),
    Column("samples/s", lambda row: _mean_text(row, "samples_per_second", ",.0f")),
    Column("training MiB", lambda row: _mean_text(row, "training_memory_bytes", ",.0f", 1 / _MIB), wide=True),
    Column("peak MiB", lambda row: _mean_text(row, "peak_memory_bytes", ",.0f", 1 / _MIB), wide=True),
    Column("seconds", lambda row: _plus_minus(row.measures["seconds"], ",.0f")),
)
"""What the tables for people show; CSV and JSON have every number."""


def shown_columns(rows: Sequence[Row]) -> list[Column]:
    """The columns without those that the caption tells."""
    return [column for column in COLUMNS if not column.folded or _varies(column, rows)]


def _varies(column: Column, rows: Sequence[Row]) -> bool:
    return len({column.cell(row) for row in rows}) > 1


def caption(results: Results) -> str:
    """What the columns mean, and what is the same in all rows."""
    same = [column for column in COLUMNS if column not in shown_columns(results.rows)]
    told = [(column.header, column.cell(results.rows[0])) for column in same] if results.rows else []
    facts = [f"{header} {cell}" for header, cell in told if cell != "-"]
    keeping = any(row.measures["full_width"] is not None for row in results.rows)
    wide = "full width: quality there, of runs that keep both; " if keeping else ""
    of = ", ".join([*facts, f"{len(results.reports)} of {results.cells} cells"])
    return (
        f"{of}; mean ± standard deviation over seeds, quality in percent but for losses and perplexity; difference to "
        f"{results.baseline}, p of a paired t-test over seeds; {wide}removed: part of the base that is gone; "
        "training MiB: of fine-tuning; peak MiB and seconds: estimation included."
    )


# -- forms -----------------------------------------------------------------------------------------------------------


def markdown_table(results: Results) -> str:
    """A Markdown table with its caption below."""
    columns = shown_columns(results.rows)
    rule = ["---" if column.left else "---:" for column in columns]
    body = [[column.cell(row).replace("|", r"\|") for column in columns] for row in results.rows]
    lines = [f"| {' | '.join(cells)} |" for cells in ([column.header for column in columns], rule, *body)]
    failed = [f"- {name}: {reason}" for name, reason in results.failures.items()]
    return "\n".join([*lines, "", caption(results), *(["", "Failed:", "", *failed] if failed else [])]) + "\n"


def latex_table(results: Results) -> str:
    r"""A LaTeX table (packages booktabs and graphicx), a rule between tasks.

    To be taken in by `\input`.
    """
    columns = shown_columns(results.rows)
    header = " & ".join(_stacked(column.header) for column in columns)
    lines = []
    for before, row in zip([None, *results.rows], results.rows, strict=False):
        if before is not None and (before.model, before.task) != (row.model, row.task):
            lines.append(r"\midrule")
        lines.append(" & ".join(latex(column.cell(row)) for column in columns) + r" \\")
    return "\n".join(
        [
            "% needs the packages booktabs and graphicx",
            r"\begin{table*}",
            r"\centering",
            r"\setlength{\belowcaptionskip}{1ex}",
            rf"\caption{{{latex(caption(results))}}}",
            r"\resizebox{\linewidth}{!}{%",
            rf"\begin{{tabular}}{{{''.join('l' if column.left else 'r' for column in columns)}}}",
            r"\toprule",
            header + r" \\",
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
_SIGN = re.compile(r"^[-+](?=\d)")


def _stacked(header: str) -> str:
    """A header with one word a line, so that its column is narrow."""
    lines = r"\\".join(latex(word) for word in header.split())
    return rf"\shortstack{{{lines}}}" if " " in header else lines


def latex(text: str) -> str:
    """Text as LaTeX shows it: special characters escaped, the sign of a number as long as a minus sign is."""
    sign = _SIGN.match(text)
    rest = "".join(_LATEX.get(character, character) for character in text[len(sign[0]) if sign else 0 :])
    return f"${sign[0]}${rest}" if sign else rest


def csv_table(results: Results) -> str:
    """Every number, unrounded, one line a row; nothing stands for what is not there."""
    file = io.StringIO()
    records = [_record(row) for row in results.rows]
    writer = csv.DictWriter(file, list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def _record(row: Row) -> dict[str, Any]:
    spreads = {"quality": spread(row.quality), "difference": spread(row.difference or [])}
    spreads |= {name: row.measures[name] for name in MEASURES}
    return {
        **{name: getattr(row, name) for name in ("model", "task", "method", "metric")},
        "seeds": len(row.seeds),
        "p": row.p,
        **{
            f"{name}_{what}": None if values is None else getattr(values, what)
            for name, values in spreads.items()
            for what in ("mean", "std")
        },
    }


WIDE = 130
"""Characters a line from which on the screen has room for all columns."""


def rich_table(results: Results, width: int = WIDE) -> Table:
    """The table on a screen of so many characters a line."""
    table = Table(
        caption=escape(caption(results)), caption_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    columns = [column for column in shown_columns(results.rows) if width >= WIDE or not column.wide]
    for column in columns:
        table.add_column(escape(column.header), justify="left" if column.left else "right", no_wrap=True)
    for row in results.rows:
        table.add_row(*(escape(column.cell(row)) for column in columns))
    return table


def write_results(out: Path, results: Results) -> None:
    """Write results.json, .csv, .md and .tex into a folder, each whole or not at all.

    Raises:
        LightPeftError: one cannot be written.
    """
    write_json(out / "results.json", {**asdict(results), "versions": versions()})
    for suffix, table in (("csv", csv_table), ("md", markdown_table), ("tex", latex_table)):
        write_text(out / f"results.{suffix}", table(results))
