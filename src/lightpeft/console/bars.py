"""How a long loop is shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import rich.progress
from rich.console import Console

from lightpeft.console.progress import Pulse

T = TypeVar("T")

quiet = False
"""Whether this process shows none: it is not the one that speaks to the user."""


def progress(items: Iterable[T], total: int, description: str) -> Iterable[T]:
    """The `total` items, in their order, with a bar on stderr; a line now and then where that is no terminal."""
    console = Console(stderr=True)
    if quiet:
        return items
    if not console.is_terminal:
        return _beating(items, Pulse(description, total))
    return rich.progress.track(items, description, total=total, console=console, transient=True)


def _beating(items: Iterable[T], pulse: Pulse) -> Iterator[T]:
    for done, item in enumerate(items):
        pulse.beat(done)
        yield item
