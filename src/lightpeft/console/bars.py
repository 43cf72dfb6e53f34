"""Progress bars of long loops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import rich.progress
from rich.console import Console

from lightpeft.console.progress import Pulse, print_line

T = TypeVar("T")

quiet = False
"""True in processes of a distributed run that print nothing."""


def progress(items: Iterable[T], total: int, description: str) -> Iterable[T]:
    """Return the `total` items with a progress bar on stderr, or with regular lines where stderr is no terminal."""
    console = Console(stderr=True)
    if quiet:
        return items
    if not console.is_terminal:
        return _with_pulse(items, Pulse(description, total))
    return rich.progress.track(items, description, total=total, console=console, transient=True)


def say(line: str) -> None:
    """Print a line on stderr, except in a process that prints nothing."""
    if not quiet:
        print_line(line)


def _with_pulse(items: Iterable[T], pulse: Pulse) -> Iterator[T]:
    for done, item in enumerate(items):
        pulse.beat(done)
        yield item
