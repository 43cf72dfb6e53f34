"""How something long that is done in steps is shown: a grid of runs, the rounds of a measurement."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class StepProgress:
    """A line on stderr for each step that ends, with the rate and the time that is left; on a terminal also a bar."""

    def __init__(self, total: int, done: int, unit: str) -> None:
        """
        Args:
            total: steps that were asked for.
            done: how many of them were there already.
            unit: what they are called.
        """
        self.total, self.before, self.done, self.unit = total, done, done, unit
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.task = self.bar.add_task("", total=total, completed=done)
        self.started = self.begun = time.monotonic()

    def __enter__(self) -> StepProgress:
        self.bar.start()
        if self.before:
            self._print(f"{self.before} of {self.total} {self.unit} are done already")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def begin(self, name: str) -> None:
        """A step begins."""
        self.begun = time.monotonic()
        self.bar.update(self.task, description=name)

    def end(self, name: str, outcome: str) -> None:
        """A step has ended, well or not."""
        now = time.monotonic()
        self.done += 1
        self.bar.update(self.task, completed=self.done)
        each = (now - self.started) / (self.done - self.before)
        left = duration(each * (self.total - self.done)) if self.done < self.total else "none"
        took = duration(now - self.begun)
        rate = f"{3600 / each:.3g} {self.unit}/h"
        self._print(f"[{self.done}/{self.total}] {name}: {outcome}; {took}, {rate}, time left: {left}")

    def _print(self, line: str) -> None:
        self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """A time as people say it: 42 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
