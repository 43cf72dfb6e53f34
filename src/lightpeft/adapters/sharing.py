"""Upload saved light adapters and merged light models to the hub."""

from __future__ import annotations

from pathlib import Path

from lightpeft.errors import LightPeftError
from lightpeft.models.repositories import Token
from lightpeft.saving.adapter_files import DESCRIPTION, read_description
from lightpeft.saving.uploading import upload
from lightpeft.saving.whole import MERGED, read_merged

_CHECKS = {DESCRIPTION: read_description, MERGED: read_merged}
"""Description file of a folder -> function that checks the folder's other files."""


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: Token = None,
    commit_message: str | None = None,
) -> str:
    """Upload a saved light adapter or merged light model to the hub, with its model card.

    Args:
        folder: folder of the model; its files are checked first.
        repo_id: repository as owner/name, which is created if it does not exist.
        private: True: create a private repository; None: the owner's default.
        revision: branch, which is created if it does not exist; None: the main branch.
        token: hub token with write access; None: that of the logged-in account.
        commit_message: message of the commit; None: a default.

    Returns:
        URL of the commit.

    Raises:
        LightPeftError: the folder has no such model, or a damaged one; or the upload fails.

    Example:
        ```python
        push_to_hub("adapter", "me/movie-reviews-light", private=True)
        ```
    """
    folder = Path(folder)
    check = next((check for marker, check in _CHECKS.items() if (folder / marker).is_file()), None)
    if check is None:
        lacking = f"it has no {' and no '.join(_CHECKS)}"
        raise LightPeftError(
            f"{folder} is not a light adapter or merged light model: {lacking}; pass the model's folder"
        )
    check(folder)

    def link(place: Path) -> None:
        place.mkdir()
        for file in folder.iterdir():
            if file.is_file() and not file.name.startswith("."):
                (place / file.name).symlink_to(file.resolve())

    return upload(link, repo_id, token=token, commit_message=commit_message, private=private, revision=revision)
