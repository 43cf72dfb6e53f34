"""Did other programs disturb a measurement of time?"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Any

import psutil

BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
"""Kinds of processor time in which a core is not free; each platform has some of them."""
LEAST_OTHERS = 0.1
"""Least part of all cores that others take when they disturb. An idle machine has 0.01 to 0.03."""
MOST_FREE = 0.1
"""Most part of all cores that is free when others disturb: with more, they did not need ours."""


class OtherWork:
    """Processor time of other programs, from the creation of this object on.

    Example:
        ```python
        others = OtherWork()
        train()
        if others.disturbing() is not None:
            print("the time of this training says little")
        ```
    """

    def __init__(self) -> None:
        self._began = _clocks()

    def disturbing(self) -> float | None:
        """Return the part of all cores that others took, in [0, 1]; None: too little, or there were free cores."""
        seconds, busy, own = (now - then for now, then in zip(_clocks(), self._began, strict=True))
        available = seconds * (os.cpu_count() or 1)
        if available <= 0:
            return None
        others, free = (busy - own) / available, 1 - busy / available
        return others if others >= LEAST_OTHERS and free <= MOST_FREE else None


def _clocks() -> tuple[float, float, float]:
    """Seconds: of the clock, of all cores that were busy, and of them for this process and those that it started."""
    all_: Any = psutil.cpu_times()
    own = os.times()  # of its children, those that have ended
    used = own.user + own.system + own.children_user + own.children_system
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            used += sum(child.cpu_times()[:4])  # with those of its own children that have ended
    return time.perf_counter(), sum(getattr(all_, kind, 0.0) for kind in BUSY), used
