"""Summarize the reports of finished cells: a record of each, and one row for each model, task and method."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from scipy.stats import ttest_rel

from lightpeft.app.folders.metrics_file import read_report
from lightpeft.app.runs.reproduce.grid import Cell, Grid
from lightpeft.files import file_checksum

Key = tuple[str, str, str]
"""Model, task and method."""
CellReport = Mapping[str, Any]
"""The part of a run's metrics.json that tables and comparisons read (see `record`)."""


def _training(report: CellReport, stage: str, what: str) -> float | None:
    return report.get("training", {}).get(stage, {}).get(what)


def _peak(report: CellReport) -> float | None:
    peaks = [_training(report, stage, "peak_memory_bytes") for stage in ("estimate", "train", "widen")]
    return max((peak for peak in peaks if peak is not None), default=None)


def _full_width(report: CellReport) -> float | None:
    return report["full_width"]["metrics"][main_metric(report)] if "full_width" in report else None


def _seconds(report: CellReport) -> float | None:
    """Seconds of a run without evaluation; None: it was interrupted, so only its last part was timed."""
    if any(cost["resumed_at"] for cost in report.get("training", {}).values()):
        return None
    return sum(seconds for stage, seconds in report["seconds"].items() if stage != "evaluate")


MEASURES: dict[str, Callable[[CellReport], float | None]] = {
    "parameters": lambda report: report["parameters"]["base"],
    "removed": lambda report: report["parameters"]["base_removed_ratio"],
    "trained": lambda report: report["parameters"]["trained"],
    "samples_per_second": lambda report: _training(report, "train", "samples_per_second"),
    "training_memory_bytes": lambda report: _training(report, "train", "peak_memory_bytes"),
    "peak_memory_bytes": _peak,
    "seconds": _seconds,
    "adapter_bytes": lambda report: report.get("adapter_bytes"),
    "full_width": _full_width,
}
"""Measures of a row besides quality: name -> function of a report. parameters: of the base after the
cut; removed: part of the base's parameters; trained: trainable parameters, the head's included; samples_per_second,
training_memory_bytes: of fine-tuning; peak_memory_bytes: of the whole run; seconds: of the run without evaluation;
adapter_bytes: of what is kept for the task beside the base (with method full: of the model); full_width: quality
at full width of a run that keeps that beside the light model (`light.after.keep: both`)."""


@dataclass(frozen=True)
class SeedSpread:
    """Mean and sample standard deviation over seeds."""

    mean: float
    std: float | None
    """None: there is only one value."""


def spread(values: Sequence[float]) -> SeedSpread | None:
    """Compute mean and standard deviation of values; None: no values."""
    if not values:
        return None
    return SeedSpread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Row:
    """One model, task and method, over the seeds that are done."""

    model: str
    task: str
    method: str
    metric: str
    """The task's main metric."""
    seeds: list[int]
    quality: list[float]
    """The main metric, one value a seed."""
    difference: list[float] | None
    """Quality minus that of the baseline with the same seed, where both are done; None for the baseline itself."""
    p: float | None
    """Two-sided p value of the paired t-test over seeds; None: fewer than two seeds, or all differences are equal."""
    measures: dict[str, SeedSpread | None]
    """A spread for each of `MEASURES`; None where no cell has it."""


@dataclass(frozen=True)
class Results:
    """Results of a grid, finished or not."""

    rows: list[Row]
    baseline: str
    cells: int
    """Cells of the whole grid."""
    command: str
    """The command line that runs the grid."""
    reports: dict[str, CellReport] = field(default_factory=dict)
    """The report of each finished cell, by the cell's name."""
    logs: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each finished cell's log.jsonl, by the cell's name: the logs themselves stay with the runs."""
    failures: dict[str, str] = field(default_factory=dict)
    """Cell -> why it failed."""


def summarize(grid: Grid, cells: Sequence[Cell], failures: Mapping[str, str] = MappingProxyType({})) -> Results:
    """Summarize the finished cells of a grid: one row for each model, task and method."""
    finished = [cell for cell in cells if cell.run.has("evaluate")]
    reports: dict[str, CellReport] = {cell.name: record(read_report(cell.run.metrics)) for cell in finished}
    logs = {cell.name: file_checksum(cell.run.log) for cell in finished if cell.run.log.is_file()}
    return results_of(grid, cells, reports, logs, failures)


def results_of(
    grid: Grid,
    cells: Sequence[Cell],
    reports: Mapping[str, CellReport],
    logs: Mapping[str, str],
    failures: Mapping[str, str] = MappingProxyType({}),
) -> Results:
    """Make the results of a grid from reports.

    Args:
        reports: cell name -> report.
        logs: cell name -> SHA-256 of its log.
    """
    baseline = grid.baseline
    groups: dict[Key, dict[int, CellReport]] = {(cell.model, cell.task, cell.method): {} for cell in cells}
    for cell in cells:
        if cell.name in reports:
            groups[cell.model, cell.task, cell.method][cell.seed] = reports[cell.name]
    rows = [row(key, group, groups[*key[:2], baseline], baseline) for key, group in groups.items() if group]
    return Results(rows, baseline, len(cells), grid.command, dict(reports), dict(logs), dict(failures))


def row(key: Key, reports: Mapping[int, CellReport], base: Mapping[int, CellReport], baseline: str) -> Row:
    """Make the row of one model, task and method.

    Args:
        reports: seed -> report.
        base: seed -> report of the baseline on the same model and task.
    """
    model, task, method = key
    metric = main_metric(next(iter(reports.values())))
    quality = {seed: report["metrics"][metric] for seed, report in reports.items()}
    paired = [(quality[seed], base[seed]["metrics"][metric]) for seed in quality if seed in base]
    differences = None if method == baseline else [own - other for own, other in paired]
    found = {name: [measure(report) for report in reports.values()] for name, measure in MEASURES.items()}
    measures = {name: spread([value for value in values if value is not None]) for name, values in found.items()}
    return Row(
        model, task, method, metric, list(quality), list(quality.values()), differences, p_value(differences), measures
    )


def p_value(differences: Sequence[float] | None) -> float | None:
    """Return the two-sided p value of a paired t-test that differences have mean 0; None: it is undefined."""
    if differences is None or len(differences) < 2 or len(set(differences)) < 2:
        return None
    return float(ttest_rel(differences, [0.0] * len(differences)).pvalue)


def main_metric(report: CellReport) -> str:
    """Return the name of the metric by which a run is compared."""
    return report["main_metric"]


def main_value(report: CellReport) -> str:
    """Return name and value of the main metric, for progress lines."""
    metric = main_metric(report)
    return f"{metric} {report['metrics'][metric]:.4f}"


# -- records -----------------------------------------------------------------------------------------------------------

_LEFT_OUT_OF_RECORDS = ("schema_version", "milestones", "warnings")
"""Entries of a report that results leave out."""
_STAGE_NAMES = ("samples_per_second", "peak_memory_bytes", "resumed_at", "others")
_MACHINE_NAMES = ("cpu", "gpu", "torch_threads", "torch", "transformers", "peft", "lightpeft")


def record(report: CellReport) -> CellReport:
    """Return the part of a run's report that results keep: settings, metrics, sizes, seconds and speeds."""
    kept = {name: value for name, value in report.items() if name not in _LEFT_OUT_OF_RECORDS}
    if "training" in report:
        kept["training"] = {stage: _pick(cost, _STAGE_NAMES) for stage, cost in report["training"].items()}
    for name, some in (("hardware", _MACHINE_NAMES), ("intervals", (report.get("main_metric"),))):
        if name in report:
            kept[name] = _pick(report[name], some)
    for name, without in (("config", "output"), ("budget", "settings")):
        if name in report:
            kept[name] = {key: value for key, value in report[name].items() if key != without}
    return kept


def _pick(values: Mapping[str, Any], names: Sequence[Any]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}
