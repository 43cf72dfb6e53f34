"""The content of a run's metrics.json, for tables and reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lightpeft.config.validation import from_dict
from lightpeft.errors import require
from lightpeft.files import explain_content_errors, read_json


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Metrics of a model, with 95% confidence intervals."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float] | None]


@dataclass(frozen=True, kw_only=True)
class ProbeQuality(Quality):
    """Metrics of a linear probe of the base model, with its time."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class Milestones:
    """Metrics of a run at its milestones, on a sample of test rows."""

    examples: int
    metrics: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameter counts of a run's model (`parameter_report`)."""

    base_dense: int
    """Of the base before the cut."""
    base: int
    """Of the base after the cut."""
    base_removed_ratio: float
    peft: int = 0
    head: int = 0
    trained: int | None = None
    """All that were trained; None: unknown, because the weights are merged."""


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Content of metrics.json that tables and reports read."""

    method: str
    metrics: dict[str, float]
    parameters: Parameters
    intervals: dict[str, tuple[float, float] | None]
    main_metric: str
    seconds: dict[str, float]
    training: dict[str, dict[str, Any]]
    adapter_bytes: int
    hardware: dict[str, Any]
    full_width: Quality | None = None
    linear_probe: ProbeQuality | None = None
    milestones: Milestones | None = None
    """None in the results of a grid, which leave out milestones and warnings."""
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        probe = self.metrics if self.linear_probe is None else self.linear_probe.metrics
        there = self.main_metric in self.metrics and self.main_metric in probe
        require(there, f"metrics has no {self.main_metric}, the main metric")

    @classmethod
    def of(cls, report: dict[str, Any]) -> RunReport:
        """Return the report in the content of a metrics.json; further keys are ignored.

        Raises:
            LightPeftError: a key is missing or has another type.
        """
        names = [each.name for each in fields(cls) if each.name in report]
        return from_dict(cls, {name: report[name] for name in names})


def read_report(path: Path) -> dict[str, Any]:
    """Return the content of a metrics.json.

    Raises:
        LightPeftError: the file is missing, damaged, or has other content.
    """
    report = read_json(path)
    with explain_content_errors(path):
        RunReport.of(report)
    return report


def other_work(*reports: Mapping[str, Any]) -> float | None:
    """Return the largest part of all cores that other programs took during a stage of runs; None: none disturbed.

    Args:
        reports: each the content of a metrics.json.
    """
    costs = [cost for report in reports for cost in report.get("training", {}).values()]
    return max((cost["others"] for cost in costs if cost.get("others")), default=None)
