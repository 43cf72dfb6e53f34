"""From a folder to a repository on the hub."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, errors

from lightpeft.errors import LightPeftError, require
from lightpeft.files.foreign import reason_of
from lightpeft.models.repositories import Token
from lightpeft.saving.cards import CARD, THIS_FOLDER, licence_of

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
"""Files of a whole model's weights."""


def send(write: Callable[[Path], object], name: str, **options: Any) -> str:
    """`upload` of a folder that is written for that alone; options, what it gives and errors are its own.

    Args:
        write: writes into it.
        name: of the repository, as owner/name.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name.rpartition("/")[2]
        write(folder)
        return upload(folder, name, **options)


def upload(
    folder: Path,
    name: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: Token = None,
    commit_message: str | None = None,
) -> str:
    """Send the files of a model's folder to a repository, which is made if it is not there.

    A whole model takes the place of one that is there, whose weights might be read instead. The card is told the
    repository's name and, where it does not know it, the licence of its base.

    Args:
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
    api, message = HfApi(token=token), commit_message or "Upload a light model"
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    try:
        repository = api.create_repo(name, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        stale = _stale({path.name for path in files}, api.list_repo_files(repository, revision=revision))
        done = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(path.name, _content(path, repository, api)) for path in files),
                *map(CommitOperationDelete, stale),
            ],
            commit_message=message,
            revision=revision,
        )
    except Exception as error:
        raise LightPeftError(f"{name} on the hub cannot be written: {_refusal(error)}") from error
    return done.commit_url


def _stale(files: set[str], there: Iterable[str]) -> list[str]:
    """Weights of a whole model in a repository that are none of those which take their place."""
    whole = any(_WEIGHTS.fullmatch(file) for file in files)
    return sorted(file for file in there if whole and file not in files and _WEIGHTS.fullmatch(file))


def _content(file: Path, repository: str, api: HfApi) -> Path | bytes:
    """What is sent of a file: itself or, of a card, what it says there."""
    if file.name != CARD:
        return file
    card = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    data: Any = card.data
    if data.license is None and isinstance(data.base_model, str):
        data.license = licence_of(data.base_model, api)
    return str(card).replace(f'"{THIS_FOLDER}"', f'"{repository}"').encode()


def _refusal(error: Exception) -> str:
    code = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if code not in (401, 403, 404):
        return reason_of(error)
    return "this account may not, or nobody is logged in; log in (hf auth login), or give a token that may write"
