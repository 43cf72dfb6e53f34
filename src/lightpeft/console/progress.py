"""Progress lines of work in steps: a grid of runs, the rounds of a measurement, training."""

from __future__ import annotations

import time

from rich.console import Console


class StepProgress:
    """Print a line on stderr for each step that ends, with the rate and the remaining time."""

    def __init__(self, total: int, done: int, unit: str) -> None:
        """
        Args:
            total: number of steps.
            done: number of steps that an earlier call has done.
            unit: name of a step, in the plural.
        """
        self.total, self.before, self.done, self.unit = total, done, done, unit
        self.started = self.begun = time.monotonic()
        if done:
            print_line(f"{done} of {total} {unit} are done already")

    def begin(self) -> None:
        """Start timing a step."""
        self.begun = time.monotonic()

    def end(self, name: str, outcome: str) -> None:
        """Print the line of a step that has ended, successfully or not."""
        now = time.monotonic()
        self.done += 1
        each = (now - self.started) / (self.done - self.before)
        left = duration(each * (self.total - self.done)) if self.done < self.total else "none"
        took = duration(now - self.begun)
        rate = f"{3600 / each:{',.0f' if each < 36 else '.3g'}} {self.unit}/h"
        print_line(f"[{self.done}/{self.total}] {name}: {outcome}; {took}, {rate}, time left: {left}")


EVERY = 30.0
"""Minimum seconds between two lines of a `Pulse`."""


class Pulse:
    """Print a progress line on stderr at regular intervals, instead of a bar where there is no terminal.

    Work that ends before the first interval prints nothing.
    """

    def __init__(self, name: str, total: int, unit: str = "", done: int = 0) -> None:
        """
        Args:
            name: name of the work.
            total: number of steps.
            unit: name of a step, in the singular.
            done: number of steps that were done before, which do not count for the rate.
        """
        self.name, self.total, self.unit, self.before = name, total, unit, done
        self._begun = self._told = time.monotonic()

    def beat(self, done: int, said: str = "") -> None:
        """Print a line if the interval since the last one has passed.

        Args:
            done: number of steps done so far.
            said: additional text, such as the loss.
        """
        now = time.monotonic()
        if now - self._told < EVERY or done <= self.before:
            return
        self._told = now
        rate = (done - self.before) / (now - self._begun)
        each = f"{self.unit}s/s" if self.unit else "per second"
        counted = f"{self.unit} {done:,} of {self.total:,}".strip()
        shown = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
        parts = [counted, said, f"{shown} {each}", f"time left: {duration(max(self.total - done, 0) / rate)}"]
        print_line(f"{self.name}: {', '.join(filter(None, parts))}")


def print_line(line: str) -> None:
    """Print a line on stderr without markup or wrapping."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(line, markup=False)


def duration(seconds: float) -> str:
    """Format a duration roughly: 42 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def exact_duration(seconds: float) -> str:
    """Format a measured duration: 4.2 s, 42 s, 2 min 10 s, 3 h 5 min."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def in_bytes(count: float) -> str:
    """Format a number of bytes: 812 B, 88 KiB, 1.3 GiB."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while abs(count) >= 1023.5 and power < len(units) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.1f} {units[power]}" if power and count < 9.95 else f"{count:,.0f} {units[power]}"
