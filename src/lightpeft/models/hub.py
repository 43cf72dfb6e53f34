"""The hub: whether it can be reached, what of a repository is needed here, and what goes there."""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, errors

from lightpeft.compat.hub import go_offline
from lightpeft.errors import LightPeftError, require
from lightpeft.files import read_text
from lightpeft.files.foreign import reason_of

Token = str | bool | None
"""Of an account: itself; None: the one that is logged in, if any; False: none."""

_PART = r"[A-Za-z0-9_][\w.-]{0,95}"
_ID = re.compile(rf"({_PART}/)?{_PART}")
_NAME = re.compile(rf"(?P<name>{_PART}/{_PART})(@(?P<revision>[\w./-]+))?")
"""A repository, with a revision of it as huggingface_hub's file system writes it."""
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "*.model",
)
"""Patterns of the files of a tokenizer."""
CARD = "README.md"
_CARD_LIMIT = 2**20
"""Bytes that a card may have whose licence is read."""
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
"""Files of a whole model's weights."""
THIS_FOLDER = "this folder"
"""What a card calls the folder that it lies in; in a repository, its name."""


def look_for(name: str) -> None:
    """To be called before the libraries below look for a model or data set by a name that may be the hub's.

    Where the hub does not answer they go offline for the rest of this process, as with HF_HUB_OFFLINE=1: they take what
    is in the cache. HF_HUB_ETAG_TIMEOUT says how many seconds an answer may take; mirrors and proxies are asked as the
    libraries ask them.
    """
    if not huggingface_hub.is_offline_mode() and not Path(name).expanduser().exists() and not answers():
        go_offline()


def commit_of(name: str, file: str, revision: str | None = None) -> str | None:
    """The commit of a model on the hub that `file` was just read of, as the cache has it; None: the model is a folder.

    Args:
        revision: that it was asked for; None: the hub's main branch.
    """
    if Path(name).expanduser().exists():
        return None
    found = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


@functools.cache
def answers() -> bool:
    """Whether the hub answers, which is asked once in a process."""
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # noqa: BLE001 - which ones there are depends on the HTTP library of the hub's client
        return False
    return True


# -- from the hub ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """Which files of a repository are a model of one form."""

    what: str
    """For people."""
    marker: str
    """The file that says what the others are."""
    files: tuple[str, ...]
    """Patterns of all that is read, the marker included. Folders within a repository are not."""


@dataclass(frozen=True)
class Repository:
    """A repository on the hub that somebody named; nothing was asked of the hub yet."""

    name: str
    """As owner/name."""
    revision: str | None = None
    """Branch, tag or commit; None: the main branch."""
    token: Token = None

    @classmethod
    def named(cls, place: str | Path, revision: str | None = None, token: Token = None) -> Repository | None:
        """The repository that a text names, as owner/name or owner/name@revision; None: a folder is meant.

        What is here comes first, and a `Path` is always a folder.

        Raises:
            LightPeftError: two revisions are given, or a revision of a folder.
        """
        found = _NAME.fullmatch(place) if isinstance(place, str) else None
        if found is None or Path(place).exists():
            require(revision is None, f"{place} is a folder, and revision={revision} is of repositories on the hub")
            return None
        both = found["revision"] is not None and revision not in (None, found["revision"])
        require(not both, f"{place} names another revision than revision={revision}; give one of them")
        return cls(found["name"], revision or found["revision"], token)

    def folder(self, *forms: Form) -> Path | None:
        """The files, in the hub's cache, of the first form that is there; None: none is, as far as can be known.

        They are downloaded as far as they are not in the cache, and nothing of them is read.

        Raises:
            LightPeftError: there is no such repository or revision, or it is not to be read with this token.
        """
        for form in forms:
            marker = self._marker(form)
            if marker is not None:
                return self._files(form, marker.parent.name)
        return None

    def _files(self, form: Form, commit: str) -> Path:
        """Of one commit, all of them."""
        with self._asking():
            return Path(
                huggingface_hub.snapshot_download(
                    self.name,
                    revision=commit,
                    token=self.token,
                    allow_patterns=list(form.files),
                    ignore_patterns=["*/*"],
                )
            )

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    def _marker(self, form: Form) -> Path | None:
        look_for(self.name)
        with self._asking():
            try:
                file = huggingface_hub.hf_hub_download(self.name, form.marker, revision=self.revision, token=self.token)
            except errors.EntryNotFoundError:  # offline, too: it is not in the cache
                return None
            return Path(file)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Turn what the hub's client raises into one line."""
        missing = f"there is no folder {self.name} here, and"
        token = "log in (hf auth login), or give a token"
        try:
            yield
        except errors.GatedRepoError as error:
            asked = f"{self.name} is open to those who were let in alone: ask for that on its page, then {token}"
            raise LightPeftError(asked) from error
        except errors.RepositoryNotFoundError as error:
            raise LightPeftError(f"{missing} no such repository on the hub; if it is private, {token}") from error
        except errors.RevisionNotFoundError as error:
            raise LightPeftError(f"{missing} {self.name} on the hub has no revision {self.revision}") from error
        except (LightPeftError, errors.EntryNotFoundError):
            raise
        except Exception as error:
            raise LightPeftError(f"{self} cannot be had from the hub: {reason_of(error)}") from error


def is_name(name: str) -> bool:
    """Whether a model's name can be one on the hub, and is no folder here."""
    return bool(_ID.fullmatch(name)) and not Path(name).exists()


def folder_of(place: str | Path, form: Form, revision: str | None = None, token: Token = None) -> Path:
    """The folder that somebody means by a path or by a name on the hub.

    Raises:
        LightPeftError: it is a name, and there is no such model; a path is not looked at.
    """
    repository = Repository.named(place, revision, token)
    if repository is None:
        return Path(place)
    found = repository.folder(form)
    if found is None:
        lacking = f"{repository} on the hub is no {form.what}: it has no {form.marker}"
        if huggingface_hub.is_offline_mode():
            lacking = f"{repository} is not in the hub's cache, and the hub was not reached"
        raise LightPeftError(f"there is no folder {place} here, and {lacking}")
    return found


# -- to the hub --------------------------------------------------------------------------------------------------


def send(
    write: Callable[[Path], object],
    name: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: Token = None,
    commit_message: str | None = None,
) -> str:
    """`upload` of a folder that is written for that alone.

    Args:
        write: writes into it.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name.rpartition("/")[2]
        write(folder)
        return upload(folder, name, private=private, revision=revision, token=token, commit_message=commit_message)


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
        there = set(api.list_repo_files(repository, revision=revision)) - {path.name for path in files}
        stale = (
            sorted(filter(_WEIGHTS.fullmatch, there)) if any(_WEIGHTS.fullmatch(path.name) for path in files) else []
        )
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


def licence_of(name: str, api: HfApi | None = None) -> str | None:
    """The licence of a model, as its card names it; None: it has no card, or says none.

    Args:
        name: folder, or name on the hub.
        api: to ask the hub; None: it is not asked, and only what is in its cache counts.
    """
    file: object = Path(name).expanduser() / CARD
    try:
        if not Path(str(file)).is_file():
            file = api.hf_hub_download(name, CARD) if api else huggingface_hub.try_to_load_from_cache(name, CARD)
        if not isinstance(file, (str, Path)):
            return None
        data: Any = ModelCard(read_text(file, _CARD_LIMIT), ignore_metadata_errors=True).data
    except Exception:  # noqa: BLE001 - a card that is missing or damaged says nothing
        return None
    return data.license if isinstance(data.license, str) else None


def _refusal(error: Exception) -> str:
    code = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if code not in (401, 403, 404):
        return reason_of(error)
    return "this account may not, or nobody is logged in; log in (hf auth login), or give a token that may write"
