"""Locks on folders: one process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightpeft.errors import LightPeftError

LOCK = ".lock"
"""Lock file of a folder. It is never removed, because only the lock on it counts."""
_PATIENCE = 0.2
"""Seconds to wait for a lock, because `check_free` takes it for a moment, too."""


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder inside the block, and create the folder if it does not exist.

    A process may take the same lock several times. The system releases it when the process ends, also if it is killed.

    Raises:
        LightPeftError: another process holds the lock, or the folder cannot be created or written to.
    """
    from filelock import FileLock, Timeout  # it imports asyncio, for which help texts do not wait

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.resolve() / LOCK, timeout=_PATIENCE, thread_local=False, is_singleton=True)
        lock.acquire()
    except Timeout as error:
        raise LightPeftError(
            f"{folder} is in use by another process; wait until that ends, or give another output"
        ) from error
    except OSError as error:
        raise LightPeftError(f"cannot write to output {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def check_free(folder: Path) -> None:
    """Check that no other process holds the lock of a folder; nothing is created.

    Raises:
        LightPeftError: another process holds it.
    """
    if (folder / LOCK).is_file():
        with lock_folder(folder):
            pass
