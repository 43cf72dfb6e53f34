"""Where a path leads."""

from __future__ import annotations

from pathlib import Path

from lightpeft.errors import LightPeftError


def resolved(path: Path) -> Path:
    """The absolute path behind all links; it need not be there.

    Raises:
        LightPeftError: its links lead in a circle, or it is in the working directory and that is gone.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: of a circle, before Python 3.13
        gone = isinstance(error, FileNotFoundError)
        why = "the working directory is gone" if gone else "its links lead in a circle"
        raise LightPeftError(f"{path} cannot be found: {why}; give another path") from error
