"""Upload the files of a model to a repository on the hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, errors

from lightpeft.errors import LightPeftError, require
from lightpeft.files.foreign import reason_of
from lightpeft.models.repositories import Token
from lightpeft.saving.cards import CARD, THIS_FOLDER

_WEIGHT_FILES = "model*.safetensors*"
"""Weight files of a complete model, which an upload replaces."""


def upload(
    write: Callable[[Path], object],
    name: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: Token = None,
    commit_message: str | None = None,
) -> str:
    """Upload the files of a model to a repository, which is created if it does not exist.

    A complete model replaces the weights of one in the repository, which would be loaded instead. The model card gets
    the repository's name.

    Args:
        write: writes the files into a folder.
        name: repository as owner/name.
        private: True: create a private repository; None: the owner's default.
        revision: branch, which is created if it does not exist; None: the main branch.
        token: hub token with write access; None: that of the logged-in account.
        commit_message: message of the commit; None: a default.

    Returns:
        URL of the commit.

    Raises:
        LightPeftError: the upload fails, or HF_HUB_OFFLINE is set.
    """
    require(not huggingface_hub.is_offline_mode(), f"cannot upload {name}: HF_HUB_OFFLINE is set; unset it")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name.rpartition("/")[2]
        write(folder)
        card = (folder / CARD).read_text(encoding="utf-8").replace(f'"{THIS_FOLDER}"', f'"{name}"')
        (folder / CARD).unlink()  # it may be a link
        (folder / CARD).write_text(card, encoding="utf-8")
        try:
            api.create_repo(name, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(name, branch=revision, exist_ok=True)
            done = api.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message=commit_message or "Upload a light model",
                revision=revision,
                delete_patterns=_WEIGHT_FILES if any(folder.glob(_WEIGHT_FILES)) else None,
            )
        except Exception as error:
            raise LightPeftError(f"cannot upload {name} to the hub: {_upload_error(error)}") from error
    return done.commit_url


def _upload_error(error: Exception) -> str:
    """Return the reason of a failed upload, with a remedy if access was denied."""
    code = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if code not in (401, 403, 404):
        return reason_of(error)
    return "access denied; log in (hf auth login), or pass a token with write access"
