"""How long do the threads of one computation wait for each other, before they leave the core to others?"""

from __future__ import annotations

import os

WAITING = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
"""Variables of the environment with which a user says how threads wait."""
SPINS = 10_000
"""Rounds in which a thread of GNU OpenMP, which PyTorch uses on Linux, asks whether the others are ready.

Its default of 300,000 suits a machine of its own. Where another program takes one of two cores, each thread keeps its
core while it waits for one that is not running: beside a busy loop, `lightpeft demo` had not ended after 400 seconds.
With this number its two runs train 2.4 times as long there as alone.
"""


def share_cores() -> None:
    """Let waiting threads leave their core soon, unless the user's environment says how they wait.

    Call it before PyTorch is imported: OpenMP reads its environment when it is loaded.
    """
    if not WAITING & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
