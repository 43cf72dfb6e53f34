"""Download of repositories from the hub: names of repositories, and the files of models in the hub's cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from lightpeft.errors import LightPeftError, require
from lightpeft.files.foreign import reason_of
from lightpeft.models.hub import NAME_PART, go_offline_if_unreachable

Token = str | bool | None
"""Access token of an account; None: that of the account that is logged in, if any; False: no account."""
_NAME = re.compile(rf"(?P<name>{NAME_PART}/{NAME_PART})(@(?P<revision>[\w./-]+))?")
"""Pattern of owner/name or owner/name@revision, as in huggingface_hub's file system."""
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "*.model",
)
"""Name patterns of the files of a tokenizer."""


@dataclass(frozen=True)
class RepositoryForm:
    """Files of a repository that make a model of one form."""

    what: str
    """Name of the form in messages."""
    marker: str
    """Name of the file that identifies the form."""
    files: tuple[str, ...]
    """Name patterns of all files to download, the marker included; subfolders are not downloaded."""


@dataclass(frozen=True)
class Repository:
    """Reference to a repository on the hub; making one does not contact the hub."""

    name: str
    """Name as owner/name."""
    revision: str | None = None
    """Branch, tag or commit; None: the main branch."""
    token: Token = None

    @classmethod
    def named(cls, place: str | Path, revision: str | None = None, token: Token = None) -> Repository | None:
        """Parse owner/name or owner/name@revision; None: `place` is a folder.

        An existing local folder takes precedence, and a `Path` is always a folder.

        Raises:
            LightPeftError: two different revisions are given, or a revision of a folder.
        """
        found = _NAME.fullmatch(place) if isinstance(place, str) else None
        if found is None or Path(place).exists():
            require(revision is None, f"{place} is a folder, which has no revision; leave out revision={revision}")
            return None
        both = found["revision"] is not None and revision not in (None, found["revision"])
        require(not both, f"{place} and revision={revision} name different revisions; give one of them")
        return cls(found["name"], revision or found["revision"], token)

    def folder(self, *forms: RepositoryForm) -> Path | None:
        """Download the files of the first form that the repository has, and return their folder in the hub's cache.

        Returns:
            None if the repository has none of the forms, or offline, if none is in the cache.

        Raises:
            LightPeftError: there is no such repository or revision, or the token gives no access to it.
        """
        for form in forms:
            marker = self._download_marker(form)
            if marker is not None:
                return self._download_files(form, marker.parent.name)
        return None

    def _download_files(self, form: RepositoryForm, commit: str) -> Path:
        """Download all files of a form from one commit."""
        with self._explain_errors():
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

    def _download_marker(self, form: RepositoryForm) -> Path | None:
        go_offline_if_unreachable(self.name)
        with self._explain_errors():
            try:
                file = huggingface_hub.hf_hub_download(self.name, form.marker, revision=self.revision, token=self.token)
            except errors.RemoteEntryNotFoundError:
                return None
            except errors.LocalEntryNotFoundError:  # not in the cache; online, the request failed
                if not huggingface_hub.is_offline_mode():
                    raise
                return None
            return Path(file)

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Turn errors of the hub's client into one line."""
        missing = f"folder {self.name} does not exist, and"
        token = "log in (hf auth login), or give a token"
        try:
            yield
        except errors.GatedRepoError as error:
            asked = f"{self.name} is a gated repository; request access on its page, then {token}"
            raise LightPeftError(asked) from error
        except errors.RepositoryNotFoundError as error:
            raise LightPeftError(f"{missing} no such repository on the hub; if it is private, {token}") from error
        except errors.RevisionNotFoundError as error:
            raise LightPeftError(f"{missing} {self.name} on the hub has no revision {self.revision}") from error
        except Exception as error:
            raise LightPeftError(f"{self} cannot be downloaded from the hub: {reason_of(error)}") from error


def folder_of(place: str | Path, form: RepositoryForm, revision: str | None = None, token: Token = None) -> Path:
    """Return the folder of a path, or download the model of a hub name and return its folder.

    Raises:
        LightPeftError: `place` is a name, and there is no such model; a path is not checked.
    """
    repository = Repository.named(place, revision, token)
    if repository is None:
        return Path(place)
    found = repository.folder(form)
    if found is None:
        lacking = f"{repository} on the hub is not a {form.what}: it has no {form.marker}"
        if huggingface_hub.is_offline_mode():
            lacking = f"{repository} is not in the hub's cache, and the hub cannot be reached"
        raise LightPeftError(f"folder {place} does not exist, and {lacking}")
    return found
