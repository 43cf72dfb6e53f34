"""How a long loop is shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

import rich.progress
from rich.console import Console

from lightpeft.console.progress import Pulse

T = TypeVar("T")


class Progress(Protocol):
    """Wraps an iterable of `total` items and shows how far it has come."""

    def __call__(self, items: Iterable[T], total: int, description: str) -> Iterable[T]:
        """The items of `items`, in their order."""
        ...


def bar(items: Iterable[T], total: int, description: str) -> Iterable[T]:
    """A rich progress bar on stderr; a line now and then where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return _beating(items, Pulse(description, total))
    return rich.progress.track(items, description, total=total, console=console, transient=True)


def _beating(items: Iterable[T], pulse: Pulse) -> Iterator[T]:
    for done, item in enumerate(items):
        pulse.beat(done)
        yield item


def silent(items: Iterable[T], total: int, description: str) -> Iterable[T]:
    """No bar."""
    return items


_CHOSEN: ContextVar[Progress] = ContextVar("progress", default=bar)


def progress(items: Iterable[T], total: int, description: str) -> Iterable[T]:
    """The items, shown as `showing` says; by a bar where it says nothing."""
    return _CHOSEN.get()(items, total, description)


def choose(chosen: Progress) -> None:
    """From here on, long loops are shown so."""
    _CHOSEN.set(chosen)


@contextmanager
def showing(chosen: Progress) -> Iterator[None]:
    """Inside the block, long loops are shown so."""
    token = _CHOSEN.set(chosen)
    try:
        yield
    finally:
        _CHOSEN.reset(token)
