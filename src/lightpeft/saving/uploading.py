"""From a folder to a repository on the hub."""

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

_WEIGHTS = "model*.safetensors*"
"""Files of a whole model's weights."""


def send(
    write: Callable[[Path], object],
    name: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: Token = None,
    commit_message: str | None = None,
) -> str:
    """Send the files of a model to a repository, which is made if it is not there.

    A whole model takes the place of one that is there, whose weights might be read instead. The card is told the
    repository's name.

    Args:
        write: writes the files into a folder.
        name: of the repository, as owner/name.
        private: whether one that is made is to be read by its owner alone; None: as is usual for the owner.
        revision: branch, which is made if it is not there; None: the main branch.
        token: of an account that may write there; None: the one that is logged in.
        commit_message: says what is new.

    Returns:
        Where the commit is.

    Raises:
        LightPeftError: it cannot be sent.
    """
    require(not huggingface_hub.is_offline_mode(), f"{name} is on the hub, and HF_HUB_OFFLINE says not to go there")
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
                delete_patterns=_WEIGHTS if any(folder.glob(_WEIGHTS)) else None,
            )
        except Exception as error:
            raise LightPeftError(f"{name} on the hub cannot be written: {_refusal(error)}") from error
    return done.commit_url


def _refusal(error: Exception) -> str:
    code = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if code not in (401, 403, 404):
        return reason_of(error)
    return "this account may not, or nobody is logged in; log in (hf auth login), or give a token that may write"
