"""Bounds in time and memory for what runs at the word of somebody else's file: regular expressions, chat templates."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightpeft.errors import LightPeftError

try:
    import resource
except ImportError:  # on Windows, where nothing is bounded
    resource = None  # type: ignore[assignment]

_PAGES_IN_USE = Path("/proc/self/statm")
"""Begins with the pages of memory that this process has asked for; on Linux alone."""


class _Expired(BaseException):
    """Passes what catches every `Exception`, as templates and parsers do."""


@contextmanager
def limited(what: str, seconds: float, memory: int | None = None) -> Iterator[None]:
    """Inside the block this process may compute for so long, and ask for so much more memory than it has.

    A signal ends what goes on too long: between two instructions of Python, and within regular expressions and powers,
    which look for signals. Signals reach the main thread alone: in another thread, and on Windows, there is no bound in
    time. What other threads compute meanwhile does not count. Memory is bounded on Linux alone, and for all threads, so
    that only short work without threads of its own belongs into such a block.

    Args:
        what: is bounded, as the beginning of the error line.
        seconds: of CPU time.
        memory: bytes; None: without a bound.

    Raises:
        LightPeftError: a bound was reached.
    """
    try:
        with _timed(seconds), _capped(memory):
            yield
    except _Expired:  # its traceback would show a user's screen full of somebody else's template
        raise LightPeftError(f"{what} needs more than {seconds:g} seconds of computing and was stopped") from None
    except MemoryError as error:
        if memory is None:
            raise
        raise LightPeftError(f"{what} needs more than {memory // 2**20} MiB of memory and was stopped") from error


@contextmanager
def _timed(seconds: float) -> Iterator[None]:
    timer = getattr(signal, "setitimer", None)
    if timer is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    end = time.thread_time() + seconds

    def expire(*_: Any) -> None:
        left = end - time.thread_time()
        if left <= 0:
            raise _Expired
        timer(signal.ITIMER_VIRTUAL, max(left, 1e-3))  # the timer runs on the time of all threads

    handler = signal.signal(signal.SIGVTALRM, expire)
    before, interval = timer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        timer(signal.ITIMER_VIRTUAL, before, interval)
        signal.signal(signal.SIGVTALRM, handler)


@contextmanager
def _capped(memory: int | None) -> Iterator[None]:
    if memory is None or resource is None or not _PAGES_IN_USE.exists():
        yield
        return
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(_PAGES_IN_USE.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    cap = min([in_use + memory, *(limit for limit in (before, most) if limit != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (cap, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))
