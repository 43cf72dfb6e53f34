"""A grid's results on disk: every number as JSON and CSV, and the tables; read again from JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from lightpeft.app.evaluation.aggregates import Estimate
from lightpeft.app.runs.reproduce.over_tasks import Summary, over_tasks
from lightpeft.app.runs.reproduce.summary import MEASURES, Results, Row, spread
from lightpeft.app.runs.reproduce.tables import markdown_table
from lightpeft.config.validation import from_dict
from lightpeft.errors import LightPeftError
from lightpeft.files import read_json, write_json, write_text
from lightpeft.profiling import versions


def csv_table(results: Results) -> str:
    """Every number of the rows, unrounded, one line a row; nothing stands for what is not there."""
    return _csv([_record(row) for row in results.rows])


def summary_csv(results: Results) -> str:
    """The same of the summaries over tasks."""
    return _csv([_summary_record(summary) for summary in over_tasks(results)])


def _csv(records: Sequence[dict[str, Any]]) -> str:
    file = io.StringIO()
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


def _summary_record(summary: Summary) -> dict[str, Any]:
    record = {name: getattr(summary, name) for name in ("model", "method", "unit")}
    record |= {"tasks": len(summary.tasks), "pairs": summary.pairs}
    for name in ("mean", "iqm", "improvement"):
        estimate: Estimate | None = getattr(summary, name)
        low, high = (estimate and estimate.interval) or (None, None)
        record |= {name: estimate and estimate.value, f"{name}_low": low, f"{name}_high": high}
    return record | {f"{name}_ratio": ratio for name, ratio in summary.ratios.items()}


def write_results(out: Path, results: Results) -> None:
    """Write results.json, .csv and .md into a folder, each whole or not at all.

    Where there is something to say over tasks, it is in all of them; as CSV in a file of its own, results.tasks.csv.

    Raises:
        LightPeftError: one cannot be written.
    """
    summaries = over_tasks(results)
    summed = [asdict(summary) for summary in summaries]
    write_json(out / "results.json", {**asdict(results), "over_tasks": summed, "versions": versions()})
    tables = {"csv": csv_table, "md": markdown_table}
    for suffix, table in (tables | ({"tasks.csv": summary_csv} if summaries else {})).items():
        write_text(out / f"results.{suffix}", table(results))


def read_results(path: str | Path) -> Results:
    """What `write_results` wrote as results.json, also by versions that measured less.

    Raises:
        LightPeftError: the file is missing, damaged, or no such file.
    """
    data, names = read_json(path), [each.name for each in fields(Results)]
    try:
        results = from_dict(Results, {name: data[name] for name in names if name in data})
    except LightPeftError as error:
        raise LightPeftError(f"{path} does not hold the results of a grid: {error}") from error
    return replace(
        results, rows=[replace(row, measures=dict.fromkeys(MEASURES) | row.measures) for row in results.rows]
    )
