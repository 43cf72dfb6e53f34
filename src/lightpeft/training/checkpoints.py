"""Find a trainer's checkpoints, without damaged or incomplete ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from lightpeft.errors import LightPeftError
from lightpeft.files import CHECKSUMS, check_sealed


def newest_checkpoint(folder: Path) -> str | None:
    """Return the checkpoint with the most steps, sealed or not; None if there is none."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit() and path.is_dir()]
    return str(max(found, key=step_of)) if found else None


def last_checkpoint(folder: Path, announce: Callable[[str], None] = lambda line: None) -> Path | None:
    """Return the newest checkpoint with an intact seal; None if there is none.

    Args:
        folder: folder of the checkpoints.
        announce: called with one line for each damaged checkpoint, which is removed.
    """
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{CHECKSUMS}") if path.parent.name[11:].isdigit()]
    for checkpoint in sorted(complete, key=step_of, reverse=True):
        try:
            check_sealed(checkpoint)
        except LightPeftError as error:
            announce(f"{error}; resuming from an older checkpoint, or from the start of the stage")
            shutil.rmtree(checkpoint, ignore_errors=True)
        else:
            return checkpoint
    return None


def step_of(checkpoint: Path) -> int:
    """Return the number of optimizer steps before a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])
