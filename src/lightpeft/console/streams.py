"""The standard streams: UTF-8 whatever the system's encoding, and without what libraries say when they are imported."""

from __future__ import annotations

import io
import logging
import os
import sys
from contextlib import suppress


def prepare() -> None:
    """Have texts come in and go out as UTF-8; to be called before anything is read or written."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # something was read already
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def hush_imports() -> None:
    """Let no library warn, when it is imported, of kernels that it lacks; to be called before they are."""
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def flush() -> None:
    """Have all that was printed on standard output be there.

    Raises:
        OSError: it cannot be written; what is still to come is dropped, or Python would fail once more at its end.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
