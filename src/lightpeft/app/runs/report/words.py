"""Formats of numbers on the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightpeft.app.evaluation.scores import LOWER_IS_BETTER
from lightpeft.console.progress import exact_duration as duration
from lightpeft.console.progress import in_bytes as size


def is_part(metric: str) -> bool:
    """Return True for metrics between 0 and 1, shown in percent; False for losses and others without an upper end."""
    return not any(metric == name or metric.endswith(f"_{name}") for name in LOWER_IS_BETTER)


def quality(metric: str, value: float) -> str:
    """Format the value of a metric: 85.1%, or 0.4312 of a loss."""
    return f"{100 * value:.1f}%" if is_part(metric) else f"{value:.4f}"


def interval(metric: str, ends: Sequence[float] | None) -> str:
    """Format the interval of a metric in the unit of `quality`, without a percent sign; empty without interval."""
    if ends is None:
        return ""
    low, high = ((f"{100 * end:.1f}" if is_part(metric) else f"{end:.4f}") for end in ends)
    return f"{low} to {high}"


def metric_name(name: str) -> str:
    """Return the display name of a metric."""
    return name.replace("_", " ")


def count(number: float) -> str:
    """Format a count with all digits and thousands separators."""
    return f"{number:,.0f}"


def share(part: float) -> str:
    """Format a fraction in percent: 60.0%."""
    return f"{100 * part:.1f}%"


FILTERS: dict[str, Callable[..., object]] = {
    "count": count,
    "duration": duration,
    "interval": interval,
    "metric_name": metric_name,
    "quality": quality,
    "share": share,
    "size": size,
}
"""Filters of the template by name."""
