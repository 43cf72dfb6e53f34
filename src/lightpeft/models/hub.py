"""Whether the hub can be reached: asked once, so that what is not there is told at once and not after all retries."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from lightpeft.compat.hub import go_offline

PART = r"[A-Za-z0-9_][\w.-]{0,95}"
"""Pattern of an owner's or a repository's name."""
_ID = re.compile(rf"({PART}/)?{PART}")


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


def is_name(name: str) -> bool:
    """Whether a model's name can be one on the hub, and is no folder here."""
    return bool(_ID.fullmatch(name)) and not Path(name).exists()
