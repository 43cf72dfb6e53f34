"""Numbers as the page says them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from lightpeft.evaluation.milestones import LOWER_IS_BETTER

_KIB = 1024
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


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


def duration(seconds: float) -> str:
    """A time to the second while that says something: 4.2 s, 2 min 10 s, 3 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def size(count: float) -> str:
    """A number of bytes: 812 KiB, 1.3 GiB."""
    power = 0
    while abs(count) >= _KIB and power < len(_UNITS) - 1:
        count, power = count / _KIB, power + 1
    return f"{count:.1f} {_UNITS[power]}" if power and count < 10 else f"{count:,.0f} {_UNITS[power]}"


def count(number: float) -> str:
    """A number of things, all digits of it."""
    return f"{number:,.0f}"


def share(part: float) -> str:
    """A part of one in percent: 60.0%."""
    return f"{100 * part:.1f}%"


def times(factor: float) -> str:
    """How many times as much: 0.62 x."""
    return f"{factor:.2f}\u00d7"


def date(seconds: float) -> str:
    """A moment, in the time of this machine."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


FILTERS = {
    each.__name__: each for each in (count, date, duration, interval, is_part, metric_name, quality, share, size, times)
}
"""By name, for the template."""
