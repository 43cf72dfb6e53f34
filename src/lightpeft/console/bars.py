"""How a long loop is shown."""

from __future__ import annotations

from collections.abc import Iterable
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
