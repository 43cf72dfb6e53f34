"""The hub's client and `datasets`: going offline while the process runs."""

from __future__ import annotations

import datasets
from huggingface_hub import constants


def go_offline() -> None:
    """Let both take what is in the cache for the rest of this process, as with HF_HUB_OFFLINE=1 from its start."""
    constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
