"""A trainer's checkpoints, of which only whole ones count."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from lightpeft.errors import LightPeftError
from lightpeft.files import CHECKSUMS, check_sealed


def newest_checkpoint(folder: Path) -> str | None:
    """The checkpoint of the most steps, as any trainer writes them; None without any."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit() and path.is_dir()]
    return str(max(found, key=step_of)) if found else None


def last_checkpoint(folder: Path, announce: Callable[[str], None] = lambda line: None) -> Path | None:
    """The newest checkpoint that is as it was written; None without any.

    Args:
        announce: told of a damaged one, which is removed.
    """
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{CHECKSUMS}") if path.parent.name[11:].isdigit()]
    for checkpoint in sorted(complete, key=step_of, reverse=True):
        try:
            check_sealed(checkpoint)
        except LightPeftError as error:
            announce(f"{error}; going on from an older checkpoint, or from the beginning of the stage")
            shutil.rmtree(checkpoint, ignore_errors=True)
        else:
            return checkpoint
    return None


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])
