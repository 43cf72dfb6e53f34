"""How a long loop is shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

import rich.progress
from rich.console import Console

T = TypeVar("T")


class Progress(Protocol):
    """Wraps an iterable of `total` items and shows how far it has come."""

    def __call__(self, items: Iterable[T], total: int, description: str) -> Iterable[T]:
        """The items of `items`, in their order."""
        ...


def bar(items: Iterable[T], total: int, description: str) -> Iterable[T]:
    """A rich progress bar on stderr; nothing where stderr is not a terminal."""
    console = Console(stderr=True)
    return rich.progress.track(
        items, description, total=total, console=console, transient=True, disable=not console.is_terminal
    )


def silent(items: Iterable[T], total: int, description: str) -> Iterable[T]:
    """No bar."""
    return items


_CHOSEN: ContextVar[Progress] = ContextVar("progress", default=bar)


def progress(items: Iterable[T], total: int, description: str) -> Iterable[T]:
    """The items, shown as `showing` says; by a bar where it says nothing."""
    return _CHOSEN.get()(items, total, description)


@contextmanager
def showing(chosen: Progress) -> Iterator[None]:
    """Inside the block, long loops are shown so."""
    token = _CHOSEN.set(chosen)
    try:
        yield
    finally:
        _CHOSEN.reset(token)
