"""Processes that each hold one subject and measure it on request.

This module imports nothing heavy: each process imports it before it imports the modules of its subject.
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
    """A process that holds one subject and measures it on request."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        """
        Args:
            make: makes the subject from `arguments` in the process; all of them can be pickled.
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
        """Call a method of the subject in its process, and return the result.

        Raises:
            LightPeftError: the measurement failed.
        """
        try:
            with suppress(BrokenPipeError):  # it ended, perhaps with a failure to be read
                self._pipe.send((what, arguments))
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise LightPeftError(
                "a measuring process ended early, perhaps out of memory; give smaller batches or a smaller model"
            ) from error
        if isinstance(answer, Failure):
            raise LightPeftError(f"measuring failed: {answer.reason}")
        return answer


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Block Ctrl-C in processes that start inside the block; this process handles it and ends them."""
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
    """Answer of a measuring process that cannot measure, with the reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _exit_on_signal(*_: Any) -> NoReturn:
    """Exit on SIGTERM as at the end of a program, so that no file and no semaphore is left over."""
    _set_handler(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)


def _set_handler(number: int, how: Any) -> None:
    with suppress(ValueError):  # in a thread, where signals cannot be handled
        signal.signal(number, how)


def _serve(pipe: Connection) -> None:
    """Make the subject from the first message, then answer requests until None arrives or the pipe closes."""
    _set_handler(signal.SIGINT, signal.SIG_IGN)  # also where starting the process has let it through
    _set_handler(signal.SIGTERM, _exit_on_signal)
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
        _set_handler(signal.SIGTERM, signal.SIG_IGN)
