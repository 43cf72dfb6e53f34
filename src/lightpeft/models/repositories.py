"""From a name on the hub to a folder: the files of a repository to be read here, in the cache of the hub's client."""

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
from lightpeft.models.hub import PART, look_for

Token = str | bool | None
"""Of an account: itself; None: the one that is logged in, if any; False: none."""
_NAME = re.compile(rf"(?P<name>{PART}/{PART})(@(?P<revision>[\w./-]+))?")
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
            except errors.RemoteEntryNotFoundError:
                return None
            except errors.LocalEntryNotFoundError:  # it is not in the cache; online, the hub failed to say more
                if not huggingface_hub.is_offline_mode():
                    raise
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
        except Exception as error:
            raise LightPeftError(f"{self} cannot be had from the hub: {reason_of(error)}") from error


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
