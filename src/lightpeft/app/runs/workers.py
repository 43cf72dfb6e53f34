"""Processes that hold one subject each and measure it when asked.

This module imports nothing heavy: a process comes through it before it imports what its subject is of.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from lightpeft.console import streams
from lightpeft.errors import LightPeftError, one_line


class Worker:
    """A process that holds one subject and measures it when asked."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        """
        Args:
            make: makes the subject of `arguments` in the process; all of them can be pickled.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, self._far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._far_end,), daemon=True)
        self._subject = make, arguments

    def __enter__(self) -> Worker:
        with _without_interrupts():
            self._process.start()
        self._far_end.close()  # so that the pipe ends when the process does
        with suppress(BrokenPipeError):  # it ended, which the first measurement tells
            self._pipe.send(self._subject)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(OSError):  # it ended already
            self._pipe.send(None)
        self._pipe.close()
        if kind is None or issubclass(kind, Exception):
            self._process.join(timeout=5)  # it ends when asked to, unless it is in the middle of something
        self._process.terminate()
        self._process.join(timeout=5)
        self._process.kill()
        self._process.join()

    def measure(self, what: str, *arguments: Any) -> Any:
        """Ask the subject for a measurement by the name of its method, and wait for the answer.

        Raises:
            LightPeftError: the measurement failed.
        """
        try:
            with suppress(BrokenPipeError):  # it ended, perhaps with a failure to be read
                self._pipe.send((what, arguments))
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise LightPeftError("a measuring process ended early; is there memory for all models?") from error
        if isinstance(answer, Failure):
            raise LightPeftError(f"measuring failed: {answer.reason}")
        return answer


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that are started inside the block leave Ctrl-C to this one, which ends them."""
    block = getattr(signal, "pthread_sigmask", None)
    if block is None:  # on Windows
        yield
        return
    before = block(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        block(signal.SIG_SETMASK, before)


class Failure:
    """What a measuring process answers when it cannot measure."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _leave(*_: Any) -> NoReturn:
    """End as at the end of a program: no file and no semaphore is left over."""
    _handle(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)


def _handle(number: int, how: Any) -> None:
    with suppress(ValueError):  # in a thread, where signals cannot be handled
        signal.signal(number, how)


def _serve(pipe: Connection) -> None:
    """Make the subject that comes first, then answer requests until there is none or the pipe is closed."""
    _handle(signal.SIGINT, signal.SIG_IGN)  # also where starting the process has let it through
    _handle(signal.SIGTERM, _leave)
    streams.silence_imports()
    try:
        make, arguments = pipe.recv()  # which imports what they are of
        from lightpeft.models.loading import quiet_libraries

        quiet_libraries()
        subject = make(*arguments)
        while request := pipe.recv():
            what, given = request
            pipe.send(getattr(subject, what)(*given))
    except EOFError:
        return
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error) if isinstance(error, LightPeftError) else traceback.format_exception_only(error)[-1]
        with suppress(OSError):  # nobody reads on
            pipe.send(Failure(one_line(reason)))
    finally:
        _handle(signal.SIGTERM, signal.SIG_IGN)
