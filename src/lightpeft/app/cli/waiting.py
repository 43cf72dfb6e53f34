"""How long do the threads of one computation wait for each other, before they leave the core to others?"""

from __future__ import annotations

import os

WAITING = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
"""Variables of the environment with which a user says how threads wait."""
SPINS = 10_000
"""Rounds in which a thread of GNU OpenMP, which PyTorch uses on Linux, asks whether the others are ready.

Its default of 300,000 suits a machine of its own: where another program takes one of two cores, each thread waits for
one that is not running, and a step takes 16 times as long. With this number it takes 2.3 times as long.
"""


def share_cores() -> None:
    """Let waiting threads leave their core soon, unless the user's environment says how they wait.

    Call it before PyTorch is imported: OpenMP reads its environment when it is loaded.
    """
    if not WAITING & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
