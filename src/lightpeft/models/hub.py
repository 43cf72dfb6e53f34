"""Whether the hub can be reached: asked once, so that what is not there is told at once and not after all retries."""

from __future__ import annotations

import functools
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from lightpeft.compat.hub import go_offline


def look_for(name: str) -> None:
    """To be called before the libraries below look for a model or data set by a name that may be the hub's.

    Where the hub does not answer they go offline for the rest of this process, as with HF_HUB_OFFLINE=1: they take what
    is in the cache. HF_HUB_ETAG_TIMEOUT says how many seconds an answer may take; mirrors and proxies are asked as the
    libraries ask them.
    """
    if not huggingface_hub.is_offline_mode() and not Path(name).expanduser().exists() and not _answers():
        go_offline()


@functools.cache
def _answers() -> bool:
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # noqa: BLE001 - which ones there are depends on the HTTP library of the hub's client
        return False
    return True
