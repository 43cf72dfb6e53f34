"""Reachability of the hub: tested once, so that errors come at once and not after all retries."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from lightpeft.compat.hub import go_offline

NAME_PART = r"[A-Za-z0-9_][\w.-]{0,95}"
"""Pattern of an owner's or a repository's name."""
_ID = re.compile(rf"({NAME_PART}/)?{NAME_PART}")


def go_offline_if_unreachable(name: str) -> None:
    """Go offline if a name may be one on the hub and the hub cannot be reached; call it before libraries look it up.

    Libraries then use their caches for the rest of this process, as with HF_HUB_OFFLINE=1. HF_HUB_ETAG_TIMEOUT is the
    timeout in seconds; mirrors and proxies of the libraries are used.
    """
    if not huggingface_hub.is_offline_mode() and not Path(name).expanduser().exists() and not is_reachable():
        go_offline()


def commit_of(name: str, file: str, revision: str | None = None) -> str | None:
    """Return the commit in the cache from which `file` of a hub model was read; None: the model is a folder.

    Args:
        revision: requested revision; None: the main branch.
    """
    if Path(name).expanduser().exists():
        return None
    found = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


@functools.cache
def is_reachable() -> bool:
    """Return whether the hub can be reached; tested once in a process."""
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # noqa: BLE001 - the exceptions depend on the HTTP library of the hub's client
        return False
    return True


def is_hub_name(name: str) -> bool:
    """Return whether a text can be the name of a hub repository, and no local folder has this name."""
    return bool(_ID.fullmatch(name)) and not Path(name).exists()
