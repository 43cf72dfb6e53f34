"""The standard streams: UTF-8 on every system, and no import warnings of libraries."""

from __future__ import annotations

import io
import logging
import os
import sys
from contextlib import suppress


def use_utf8() -> None:
    """Set standard input and output to UTF-8; call it before anything is read or written."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # something was read already
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def silence_imports() -> None:
    """Silence warnings about missing kernels at the import of libraries; call it before the imports."""
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def flush() -> None:
    """Flush standard output.

    Raises:
        OSError: the output cannot be written; later output is dropped, because Python would fail again at its exit.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
