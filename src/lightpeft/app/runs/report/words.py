"""Numbers as the page says them."""

from __future__ import annotations

import time
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
    """A metric or milestone by name, for people."""
    return name.replace("_", " ")


def count(number: float) -> str:
    """A number of things, all digits of it."""
    return f"{number:,.0f}"


def rounds(done: int, asked: int | None = None) -> str:
    """Alternations of a measurement: 3 rounds; of one that was stopped, 1 of 3 rounds."""
    of = f" of {asked}" if asked is not None and done < asked else ""
    return f"{done}{of} round{'s' * (done != 1 or bool(of))}"


def share(part: float) -> str:
    """A part of one in percent: 60.0%."""
    return f"{100 * part:.1f}%"


def times(factor: float) -> str:
    """How many times as much: 0.62 x."""
    return f"{factor:.2f}\u00d7"


def date(seconds: float) -> str:
    """A moment, in the time of this machine."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


FILTERS: dict[str, Callable[..., object]] = {
    "count": count,
    "date": date,
    "duration": duration,
    "interval": interval,
    "metric_name": metric_name,
    "quality": quality,
    "rounds": rounds,
    "share": share,
    "size": size,
}
"""By name, for the template."""

__all__ = [
    "FILTERS",
    "count",
    "date",
    "duration",
    "interval",
    "is_part",
    "metric_name",
    "quality",
    "rounds",
    "share",
    "size",
    "times",
]
