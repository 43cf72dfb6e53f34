"""Bounds of what files of others make this process do."""

from __future__ import annotations

import re
import resource
import signal
import threading
import time

import pytest

from lightpeft.errors import LightPeftError
from lightpeft.files.limits import limited

ENDLESS = re.compile(r"(a+)+$"), "a" * 40 + "b"


def match() -> None:
    ENDLESS[0].match(ENDLESS[1])


def state() -> tuple[object, ...]:
    return (
        signal.getsignal(signal.SIGVTALRM),
        signal.getitimer(signal.ITIMER_VIRTUAL),
        resource.getrlimit(resource.RLIMIT_AS),
    )


def test_time() -> None:
    before = state()
    line = "^matching needs more than 0.1 seconds of computing and was stopped$"
    with pytest.raises(LightPeftError, match=line), limited("matching", 0.1):
        match()
    assert state() == before


def test_what_catches_every_exception_is_stopped_too() -> None:
    with pytest.raises(LightPeftError, match="seconds"), limited("catching", 0.1):
        while True:
            try:
                match()
            except Exception:  # noqa: BLE001 (as templates and parsers do)
                pytest.fail("it was caught")


def test_what_other_threads_compute_does_not_count() -> None:
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        with limited("waiting", 0.05):
            time.sleep(0.3)
        with pytest.raises(LightPeftError, match="seconds"), limited("matching", 0.1):
            match()
    finally:
        stop.set()
        thread.join()


def test_memory() -> None:
    before = state()
    line = "^growing needs more than 64 MiB of memory and was stopped$"
    with pytest.raises(LightPeftError, match=line), limited("growing", 5, 64 * 2**20):
        bytearray(2**30)  # more than tests before may have left free in the heap
    assert state() == before
    with limited("growing", 5, 128 * 2**20):
        bytearray(80 * 2**20)
    with pytest.raises(MemoryError), limited("growing", 5):
        bytearray(2**60)
