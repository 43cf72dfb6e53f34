"""The standard streams: closed, full, or of an encoding that lacks letters, they end no work, and nothing is lost
silently."""

from __future__ import annotations

import codecs
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from lightpeft.errors import LightPeftError, require


def prepare() -> None:
    """Make the streams of this process safe to use; to be called before anything else is opened."""
    _occupy()
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # something was read already
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        encoding = getattr(sys.stderr, "encoding", "utf-8")
        raw = _Forgiving(2, "w", closefd=False)
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)


def hush_imports() -> None:
    """Let no library warn, when it is imported, of kernels that it lacks; to be called before they are."""
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _occupy() -> None:
    """Let closed standard streams lead nowhere: the next file that is opened would take their place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


class _Forgiving(io.FileIO):
    """Takes everything: a message that cannot be shown is no reason to end a run."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def standard_input() -> TextIO:
    """Standard input, to be read from.

    Raises:
        LightPeftError: it is closed.
    """
    require(sys.stdin is not None, "standard input is closed; give a file instead of -")
    return sys.stdin


def standard_output() -> TextIO:
    """Standard output, for what is to be found nowhere else.

    Raises:
        LightPeftError: it is closed.
    """
    require(sys.stdout is not None, "standard output is closed, and what was asked for would go there; open it")
    return sys.stdout


@contextmanager
def written() -> Iterator[None]:
    """At the end of the block, what it printed on standard output is really out.

    Raises:
        LightPeftError: it cannot be written; what is still to come is dropped.
        BrokenPipeError: nobody reads on.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        raise
    except OSError as error:
        _drop_output()
        reason = error.strerror or error
        raise LightPeftError(f"standard output cannot be written: {reason}; not all of the output is there") from error


@contextmanager
def flushed() -> Iterator[None]:
    """The same for a block that ends a process, however it ends."""
    try:
        yield
    finally:
        with written():
            pass


def _drop_output() -> None:
    """Let standard output lead nowhere: Python flushes once more at the end."""
    with suppress(OSError):  # a stream without a file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextmanager
def utf8_output() -> Iterator[TextIO]:
    """Standard output as a file in UTF-8, whatever the encoding of the screen.

    Raises:
        LightPeftError: it is closed or cannot be written, or a text has half a character.
        BrokenPipeError: nobody reads on.
    """
    stream = standard_output()
    with written():
        buffer = getattr(stream, "buffer", None)
        if buffer is None:  # of a notebook
            yield stream
            return
        stream.flush()
        try:
            yield cast(TextIO, codecs.getwriter("utf-8")(buffer))  # which does not close it when it goes
        except UnicodeEncodeError as error:
            raise LightPeftError("standard output cannot be written: there is half a character in a text") from error
