"""The table of a grid's results, in Markdown and on the screen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pandas import DataFrame
from rich.markup import escape
from rich.table import Table

from lightpeft.app.evaluation.scores import LOWER_IS_BETTER
from lightpeft.app.folders.metrics_file import other_work
from lightpeft.app.runs.reproduce.results import Results, Row, SeedSpread, spread

_MIB = 2**20
WIDE = 130
"""Screen width in characters from which all columns fit."""
NAMES = ("model", "task", "method", "metric")
"""Left-aligned columns."""
FOLDED = ("model", "task", "metric", "seeds", "full width")
"""Columns that move to the caption if all rows have the same value."""
GROUPED = ("model", "task", "metric")
"""Columns that narrow screens show as the heading of a group of rows."""
LEFT_OUT = ("p", "parameters", "trained", "adapter KiB", "samples/s", "training MiB", "peak MiB")
"""Columns that narrow screens leave out."""
MEANINGS = {
    "quality": "in percent, except losses and perplexity",
    "difference": "to {baseline}",
    "p": "of a paired t-test over seeds",
    "full width": "quality of the full-width model, where a run keeps both",
    "parameters": "of the base after the cut",
    "removed, %": "of the base's parameters",
    "trained": "trainable parameters",
    "samples/s": "of fine-tuning",
    "training MiB": "of fine-tuning",
    "peak MiB": "of the run",
    "seconds": "of the run, with estimation",
}
"""What a column shows, for the caption."""


def _text(values: SeedSpread | None, form: str, factor: float = 1.0, std: bool = True) -> str:
    """Format the mean and, with more than one value, the standard deviation; "-" without values."""
    if values is None:
        return "-"
    mean = f"{factor * values.mean:{form}}"
    return mean if values.std is None or not std else f"{mean} ± {factor * values.std:{form.lstrip('+')}}"


def _p(p: float | None) -> str:
    if p is None:
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def count(number: float | None) -> str:
    """Format a number of parameters: all digits below a million, then in millions (M) or billions (B)."""
    if number is None:
        return "-"
    if number < 1e6:
        return f"{number:,.0f}"
    return f"{number / 1e6:.1f}M" if number < 1e9 else f"{number / 1e9:.2f}B"


def _cells(row: Row) -> dict[str, str]:
    """Return the cells of a row of the table; results.json has every number."""
    points = 1.0 if row.metric in LOWER_IS_BETTER else 100.0
    found = row.measures
    sizes = {name: None if (of := found[name]) is None else of.mean for name in ("parameters", "trained")}
    return {
        "model": row.model,
        "task": row.task,
        "method": row.method,
        "metric": row.metric,
        "seeds": str(len(row.seeds)),
        "quality": _text(spread(row.quality), ".1f", points),
        "difference": _text(spread(row.difference or []), "+.1f", points),
        "p": _p(row.p),
        "full width": _text(found["full_width"], ".1f", points),
        "parameters": count(sizes["parameters"]),
        "removed, %": _text(found["removed"], ".1f", 100.0, std=False),
        "trained": count(sizes["trained"]),
        "adapter KiB": _text(found["adapter_bytes"], ",.0f", 1 / 1024, std=False),
        "samples/s": _text(found["samples_per_second"], ",.0f", std=False),
        "training MiB": _text(found["training_memory_bytes"], ",.0f", 1 / _MIB, std=False),
        "peak MiB": _text(found["peak_memory_bytes"], ",.0f", 1 / _MIB, std=False),
        "seconds": _text(found["seconds"], ",.0f"),
    }


def _display_table(results: Results) -> tuple[DataFrame, list[str]]:
    """Make the table, with a row for each model, task and method, and what its caption says of all rows."""
    nothing = dict.fromkeys(("method", "quality", "difference"), "")
    table = DataFrame([_cells(row) for row in results.rows], columns=None if results.rows else list(nothing))
    same = [name for name in FOLDED if name in table and table[name].nunique() == 1]
    told = [f"{name} {table[name][0]}" for name in same if table[name][0] != "-"]
    disturbed = sum(other_work(report) is not None for report in results.reports.values())
    beside = f" ({disturbed} beside other programs: their times do not compare)" if disturbed else ""
    done = f"{len(results.reports)} of {results.cells} cells are done{beside}; mean ± standard deviation over seeds"
    return table.drop(columns=same), [*told, done]


def _caption(told: Sequence[str], columns: Iterable[str], baseline: str) -> str:
    """Say what holds for all rows, and what the columns show."""
    meanings = [f"{name}: {MEANINGS[name].format(baseline=baseline)}" for name in columns if name in MEANINGS]
    return "; ".join([", ".join(told), *meanings]) + "."


def markdown_table(results: Results) -> str:
    """Return the table in Markdown with its caption, and the failed cells."""
    table, told = _display_table(results)
    rule = ["---" if name in NAMES else "---:" for name in table]
    body = [[cell.replace("|", r"\|") for cell in row] for row in table.itertuples(index=False)]
    lines = [f"| {' | '.join(cells)} |" for cells in (list(table), rule, *body)]
    failed = [f"- {name}: {reason}" for name, reason in results.failures.items()]
    caption = _caption(told, table, results.baseline)
    return "\n".join([*lines, "", caption, *(["", "Failed:", "", *failed] if failed else [])]) + "\n"


def rich_table(results: Results, width: int = WIDE) -> Table:
    """Make the table for a screen; a narrow one has fewer columns, and a heading for each model and task."""
    frame, told = _display_table(results)
    groups: list[tuple[str, DataFrame]] = [("", frame)]
    if width < WIDE:
        frame = frame.drop(columns=list(LEFT_OUT), errors="ignore")
        headings = [name for name in GROUPED if name in frame]
        if headings:
            grouped = frame.groupby(headings, sort=False)
            groups = [(", ".join(of), rows.drop(columns=headings)) for of, rows in grouped]
    columns = list(groups[0][1])
    caption = escape(_caption(told, columns, results.baseline))
    table = Table(caption=caption, caption_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(escape(name), justify="left" if name in NAMES else "right", no_wrap=name != "method")
    for heading, rows in groups:
        if heading:
            table.add_row(f"[bold]{escape(heading)}[/bold]")
        for row in rows.itertuples(index=False):
            table.add_row(*map(escape, row))
    return table
