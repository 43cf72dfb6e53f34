"""From the reports of finished cells to a record of each, and to one row for each model, task and method."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from scipy.stats import ttest_rel

from lightpeft.app.folders.run_folder import read_report
from lightpeft.app.runs.reproduce.grid import Cell, Grid
from lightpeft.files import file_checksum

Key = tuple[str, str, str]
"""Model, task and method."""
Report = Mapping[str, Any]
"""Of a run's metrics.json, what tables and comparisons read (`record`)."""


def _training(report: Report, stage: str, what: str) -> float | None:
    return report.get("training", {}).get(stage, {}).get(what)


def _peak(report: Report) -> float | None:
    peaks = [_training(report, stage, "peak_memory_bytes") for stage in ("estimate", "train", "widen")]
    return max((peak for peak in peaks if peak is not None), default=None)


def _full_width(report: Report) -> float | None:
    return report["full_width"]["metrics"][main_metric(report)] if "full_width" in report else None


def _seconds(report: Report) -> float | None:
    """Of the whole run but the evaluation; None of a run that was interrupted, which only knows its last part."""
    if any(cost["resumed_at"] for cost in report.get("training", {}).values()):
        return None
    return sum(seconds for stage, seconds in report["seconds"].items() if stage != "evaluate")


MEASURES: dict[str, Callable[[Report], float | None]] = {
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
"""What a row has besides the quality. parameters: of the base that is left; removed: part of the base that is gone;
trained: trainable parameters, the head's included; samples_per_second and training_memory_bytes: of fine-tuning;
peak_memory_bytes: of the whole run, estimation included; seconds: of the whole run, evaluation left out;
adapter_bytes: of what is kept for the task beside the base (with method full: of the model); full_width: quality
at full width of a run that keeps that beside the light model (`light.after.keep: both`)."""


@dataclass(frozen=True)
class SeedSpread:
    """Mean and sample standard deviation over seeds."""

    mean: float
    std: float | None
    """None of a single value."""


def spread(values: Sequence[float]) -> SeedSpread | None:
    """Of the values; None where there are none."""
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
    """The quality minus that of the baseline with the same seed, where both are done; None of the baseline."""
    p: float | None
    """Of the paired t-test over seeds; None where there are fewer than two, or all differences are equal."""
    measures: dict[str, SeedSpread | None]
    """A spread for each of `MEASURES`; None where no cell has it."""


@dataclass(frozen=True)
class Results:
    """What a grid has come to so far."""

    rows: list[Row]
    baseline: str
    cells: int
    """Cells of the whole grid."""
    command: str
    """The command line that runs the grid."""
    reports: dict[str, Report] = field(default_factory=dict)
    """The report of each finished cell, by the cell's name."""
    logs: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each finished cell's log.jsonl, by the cell's name: the logs themselves stay with the runs."""
    failures: dict[str, str] = field(default_factory=dict)
    """Cell -> why it failed."""


def summarize(grid: Grid, cells: Sequence[Cell], failures: Mapping[str, str] = MappingProxyType({})) -> Results:
    """One row for each model, task and method that has a finished cell."""
    finished = [cell for cell in cells if cell.run.has("evaluate")]
    reports: dict[str, Report] = {cell.name: record(read_report(cell.run.metrics)) for cell in finished}
    logs = {cell.name: file_checksum(cell.run.log) for cell in finished if cell.run.log.is_file()}
    return results_of(grid, cells, reports, logs, failures)


def results_of(
    grid: Grid,
    cells: Sequence[Cell],
    reports: Mapping[str, Report],
    logs: Mapping[str, str],
    failures: Mapping[str, str] = MappingProxyType({}),
) -> Results:
    """The same of reports and checksums of logs by the names of their cells."""
    baseline = grid.baseline
    groups: dict[Key, dict[int, Report]] = {(cell.model, cell.task, cell.method): {} for cell in cells}
    for cell in cells:
        if cell.name in reports:
            groups[cell.model, cell.task, cell.method][cell.seed] = reports[cell.name]
    rows = [row(key, group, groups[*key[:2], baseline], baseline) for key, group in groups.items() if group]
    return Results(rows, baseline, len(cells), grid.command, dict(reports), dict(logs), dict(failures))


def row(key: Key, reports: Mapping[int, Report], base: Mapping[int, Report], baseline: str) -> Row:
    """The row of one model, task and method.

    Args:
        reports: by seed.
        base: reports of the baseline on the same model and task, by seed.
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
    """Two-sided p value of the paired t-test that the differences have mean 0."""
    if differences is None or len(differences) < 2 or len(set(differences)) < 2:
        return None
    return float(ttest_rel(differences, [0.0] * len(differences)).pvalue)


def main_metric(report: Report) -> str:
    """The name of the metric that a run's quality is told by."""
    return report["main_metric"]


def main_value(report: Report) -> str:
    """The quality of one run, as progress lines have it."""
    metric = main_metric(report)
    return f"{metric} {report['metrics'][metric]:.4f}"


# -- records -----------------------------------------------------------------------------------------------------------

_OF_THE_RUN = ("schema_version", "milestones", "warnings")
"""Of a report, what stays in the run's folder."""
_OF_A_STAGE = ("samples_per_second", "peak_memory_bytes", "resumed_at")
_OF_A_MACHINE = ("cpu", "gpu", "torch_threads", "torch", "transformers", "peft", "lightpeft")


def record(report: Report) -> Report:
    """What results keep of a run's report: its settings, metrics, sizes, seconds and speeds."""
    kept = {name: value for name, value in report.items() if name not in _OF_THE_RUN}
    if "training" in report:
        kept["training"] = {stage: _some(cost, _OF_A_STAGE) for stage, cost in report["training"].items()}
    for name, some in (("hardware", _OF_A_MACHINE), ("intervals", (report.get("main_metric"),))):
        if name in report:
            kept[name] = _some(report[name], some)
    for name, without in (("config", "output"), ("budget", "settings")):
        if name in report:
            kept[name] = {key: value for key, value in report[name].items() if key != without}
    return kept


def _some(values: Mapping[str, Any], names: Sequence[Any]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}
