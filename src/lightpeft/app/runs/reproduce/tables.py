"""A grid's results as tables for people: in Markdown and on the screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from lightpeft.app.evaluation.aggregates import Estimate
from lightpeft.app.runs.reproduce.over_tasks import POINTS, Summary, over_tasks, scale_of, without_scale
from lightpeft.app.runs.reproduce.results import Results, Row, Spread, spread

_MIB = 2**20
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


# -- cells -----------------------------------------------------------------------------------------------------------


def _plus_minus(values: Spread | None, form: str, factor: float = 1.0) -> str:
    """Mean and standard deviation; "-" where there is nothing."""
    if values is None:
        return "-"
    mean = f"{factor * values.mean:{form}}"
    return mean if values.std is None else f"{mean} ± {factor * values.std:{form.lstrip('+')}}"


def _factor(row: Row) -> float:
    return 100.0 if scale_of(row.metric) is POINTS else 1.0


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


COLUMNS: tuple[Column[Row], ...] = (
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


def cells_sheet(results: Results) -> Sheet[Row]:
    """A row for each model, task and method."""
    keeping = any(row.measures["full_width"] is not None for row in results.rows)
    wide = "full width: quality there, of runs that keep both; " if keeping else ""
    meaning = (
        f"{len(results.reports)} of {results.cells} cells; mean ± standard deviation over seeds, quality in percent "
        f"but for losses and perplexity; difference to {results.baseline}, p of a paired t-test over seeds; {wide}"
        "removed: part of the base that is gone; training MiB: of fine-tuning; peak MiB and seconds: estimation "
        "included."
    )
    return Sheet(COLUMNS, results.rows, meaning)


# -- over tasks ------------------------------------------------------------------------------------------------------


def _estimate(estimate: Estimate | None, form: str) -> str:
    """The value and its interval, as far as there are such."""
    if estimate is None:
        return "-"
    ends = "" if estimate.interval is None else " [{:{form}}, {:{form}}]".format(*estimate.interval, form=form)
    return f"{estimate.value:{form}}{ends}"


def _gain(summary: Summary, estimate: Estimate | None) -> str:
    return _estimate(estimate, "+.1f" if summary.unit == POINTS.unit else "+.3f")


def _ratio(summary: Summary, name: str) -> str:
    ratio = summary.ratios[name]
    return "-" if ratio is None else f"{ratio:.2f}"


SUMMARY_COLUMNS: tuple[Column[Summary], ...] = (
    Column("model", lambda summary: summary.model, left=True, folded=True),
    Column("method", lambda summary: summary.method, left=True),
    Column("tasks", lambda summary: str(len(summary.tasks)), folded=True),
    Column("pairs", lambda summary: str(summary.pairs), folded=True),
    Column("unit", lambda summary: summary.unit, left=True, folded=True),
    Column("mean", lambda summary: _gain(summary, summary.mean)),
    Column("IQM", lambda summary: _gain(summary, summary.iqm)),
    Column("P(better)", lambda summary: _estimate(summary.improvement, ".2f")),
    Column("seconds ratio", lambda summary: _ratio(summary, "seconds")),
    Column("samples/s ratio", lambda summary: _ratio(summary, "samples_per_second"), wide=True),
)


def summary_sheet(results: Results) -> Sheet[Summary] | None:
    """A row for each model and method over tasks; None where no method has two tasks to compare."""
    summaries = over_tasks(results)
    if not summaries:
        return None
    return Sheet(SUMMARY_COLUMNS, summaries, _meaning(results, summaries))


def _meaning(results: Results, summaries: Sequence[Summary]) -> str:
    estimates = [each for summary in summaries for each in (summary.mean, summary.improvement)]
    known = {estimate.interval is not None for estimate in estimates}
    intervals = {
        True: "[95% interval, by bootstrap over the seeds of each task; the tasks stay the same]",
        False: "no interval where a task has one seed, or all seeds agree: they say nothing about others",
    }
    said = [
        f"differences to {results.baseline} over tasks, paired by task and seed, + is better",
        "IQM: mean of the middle half of the pairs",
        "P(better): part of the pairs in which it is, ties half",
        *(words for there, words in intervals.items() if there in known),
        "ratios: median over pairs of the value by the baseline's",
        *(f"{metric} is left out: tasks have no unit of it in common" for metric in without_scale(results)),
    ]
    return "; ".join(said) + "."


# -- forms -----------------------------------------------------------------------------------------------------------


def _sheets(results: Results) -> list[Sheet[Any]]:
    summary = summary_sheet(results)
    return [cells_sheet(results), *([] if summary is None else [summary])]


def markdown_table(results: Results) -> str:
    """Markdown tables with their captions below."""
    failed = [f"- {name}: {reason}\n" for name, reason in results.failures.items()]
    return "\n".join([*map(markdown, _sheets(results)), *(["Failed:\n", "".join(failed)] if failed else [])])


def rich_table(results: Results, width: int = WIDE) -> Group:
    """The tables on a screen of so many characters a line."""
    tables = [rich(sheet, width) for sheet in _sheets(results)]
    return Group(*[part for table in tables for part in ("", table)][1:])
