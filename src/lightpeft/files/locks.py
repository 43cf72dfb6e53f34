"""One process at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightpeft.errors import LightPeftError

LOCK = ".lock"
"""File of a folder that whoever works in it holds; it stays, because only its lock says something."""
_PATIENCE = 0.2
"""Seconds: somebody who only looks (`check_free`) has the lock for a moment, too."""


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Inside the block no other process holds the folder, which is made if it is not there; one process may hold it
    many times over. The lock goes with the process, however that ends.

    Raises:
        LightPeftError: another process holds it, or it cannot be made or written to.
    """
    from filelock import FileLock, Timeout  # it imports asyncio, for which help texts do not wait

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.resolve() / LOCK, timeout=_PATIENCE, thread_local=False, is_singleton=True)
        lock.acquire()
    except Timeout as error:
        raise LightPeftError(
            f"{folder} is in use by another process; wait until it ends, or give another output"
        ) from error
    except OSError as error:
        raise LightPeftError(f"cannot write to output {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def check_free(folder: Path) -> None:
    """Refuse a folder that another process holds just now; nothing is made.

    Raises:
        LightPeftError: one does.
    """
    if (folder / LOCK).is_file():
        with holding(folder):
            pass


def is_own_file(path: Path) -> bool:
    """Whether a file is there for this package's own order: a lock, or something temporary."""
    return path.name == LOCK or (path.name.startswith(".") and path.name.endswith(".tmp"))
