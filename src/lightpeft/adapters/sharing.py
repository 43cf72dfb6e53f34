"""Folders that lightpeft wrote, on their way to the hub."""

from __future__ import annotations

from pathlib import Path

from lightpeft.errors import LightPeftError
from lightpeft.models.repositories import Token
from lightpeft.saving.adapter_files import DESCRIPTION, read_description
from lightpeft.saving.uploading import send
from lightpeft.saving.whole import MERGED, read_merged

_CHECKS = {DESCRIPTION: read_description, MERGED: read_merged}
"""File in a folder -> what checks the others by it."""


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: Token = None,
    commit_message: str | None = None,
) -> str:
    """Send a light adapter or a merged light model that was saved to the hub, with its card.

    Args:
        folder: of it; it is checked first.
        repo_id: owner/name of a repository, which is made if it is not there.
        private: whether one that is made is to be read by its owner alone; None: as is usual for the owner.
        revision: branch, which is made if it is not there; None: the main branch.
        token: of an account that may write there; None: the one that is logged in.
        commit_message: says what is new.

    Returns:
        Where the commit is.

    Raises:
        LightPeftError: there is no such model in the folder, or a damaged one; or it cannot be sent.
    """
    folder = Path(folder)
    check = next((check for marker, check in _CHECKS.items() if (folder / marker).is_file()), None)
    if check is None:
        lacking = f"it has no {' and no '.join(_CHECKS)}"
        raise LightPeftError(f"{folder} is no light adapter and no merged light model: {lacking}")
    check(folder)

    def link(place: Path) -> None:
        place.mkdir()
        for file in folder.iterdir():
            if file.is_file() and not file.name.startswith("."):
                (place / file.name).symlink_to(file.resolve())

    return send(link, repo_id, token=token, commit_message=commit_message, private=private, revision=revision)
