"""Numbers as the page says them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightpeft.app.evaluation.milestones import LOWER_IS_BETTER
from lightpeft.console.progress import exact_duration as duration
from lightpeft.console.progress import in_bytes as size


def is_part(metric: str) -> bool:
    """Whether a metric is a part of one, which people read in percent (losses and the like have no upper end)."""
    return not any(metric == name or metric.endswith(f"_{name}") for name in LOWER_IS_BETTER)


def quality(metric: str, value: float) -> str:
    """A metric's value: 85.1%, or 0.4312 where percents make no sense."""
    return f"{100 * value:.1f}%" if is_part(metric) else f"{value:.4f}"


def interval(metric: str, ends: Sequence[float] | None) -> str:
    """Its interval, in the unit of the value and without saying it again; nothing where there is none."""
    if ends is None:
        return ""
    low, high = ((f"{100 * end:.1f}" if is_part(metric) else f"{end:.4f}") for end in ends)
    return f"{low} to {high}"


def metric_name(name: str) -> str:
    """A metric by name, for people."""
    return name.replace("_", " ")


def count(number: float) -> str:
    """A number of things, all digits of it."""
    return f"{number:,.0f}"


def share(part: float) -> str:
    """A part of one in percent: 60.0%."""
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
"""By name, for the template."""
