"""One process at a time in a folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightpeft.errors import LightPeftError
from lightpeft.files.places import resolved

try:
    import fcntl
except ImportError:  # on Windows folders are not locked
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""File of a folder that whoever works in it holds; it stays, because only its lock says something."""
_mine: dict[Path, int] = {}
"""Folders that this process holds -> how many times."""


class InUseError(LightPeftError):
    """Another process works in the folder."""


@contextmanager
def holding(folder: Path, *, wait: Callable[[], None] | None = None, inherited: bool = False) -> Iterator[None]:
    """Inside the block no other process holds the folder, which is made if it is not there; one process may hold it
    many times over. The lock goes with the process, however that ends.

    Args:
        wait: called once before waiting for another process; None: do not wait.
        inherited: processes that are started inside the block hold the folder, too.

    Raises:
        InUseError: another process holds it.
        LightPeftError: it cannot be made or written to.
    """
    place, descriptor = resolved(folder), None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is not None and place not in _mine:
            descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise LightPeftError(f"cannot write to output {folder}: {error.strerror or error}") from error
    try:
        if descriptor is not None:
            _take(descriptor, folder, wait)
            os.set_inheritable(descriptor, inherited)
        with _counted(place):
            yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def _counted(place: Path) -> Iterator[None]:
    """Inside the block this process knows that it holds the folder."""
    _mine[place] = _mine.get(place, 0) + 1
    try:
        yield
    finally:
        _mine[place] -= 1
        if not _mine[place]:
            del _mine[place]


def check_free(folder: Path) -> None:
    """Refuse a folder that another process holds just now; nothing is made.

    Raises:
        InUseError: one does.
    """
    if fcntl is None or resolved(folder) in _mine or not (folder / LOCK).is_file():
        return
    with suppress(OSError):  # what is wrong with the folder is said by who writes to it
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # those who only look are not in each other's way
        except BlockingIOError as error:
            raise _in_use(descriptor, folder) from error
        finally:
            os.close(descriptor)


def _take(descriptor: int, folder: Path, wait: Callable[[], None] | None) -> None:
    """Lock, and say in the lock whose it is; where the file system has no locks, do without."""
    if not _lock(descriptor, folder, wait):
        return
    with suppress(OSError):  # a full disk is no reason not to work, only to say less
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)


def _lock(descriptor: int, folder: Path, wait: Callable[[], None] | None) -> bool:
    """Whether the file system has locks; raises where somebody has this one, or waits."""
    for _ in range(_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE)
        except OSError:
            return False
        else:
            return True
    if wait is None:
        raise _in_use(descriptor, folder)
    wait()
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return True


_TRIES, _PAUSE = 5, 0.02
"""Somebody who only looks (`check_free`) has the lock for a moment, too; seconds."""


def _in_use(descriptor: int, folder: Path) -> InUseError:
    who = _holder(descriptor)
    return InUseError(f"{folder} is in use by another process ({who}); wait until it ends, or give another output")


def _holder(descriptor: int) -> str:
    number = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
    return f"number {number}" if number.isdigit() else "of an unknown number"


def is_dead(path: Path) -> bool:
    """Whether whoever made a temporary file or folder, which it holds as long as it lives, is gone."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return path.is_symlink()  # nobody here makes links
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)


def hold_temporary(descriptor: int) -> None:
    """Show that the maker of a temporary file or folder lives, for as long as the descriptor is open."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_own_file(path: Path) -> bool:
    """Whether a file is there for this package's own order: a lock, or something temporary."""
    return path.name == LOCK or (path.name.startswith(".") and path.name.endswith(".tmp"))
