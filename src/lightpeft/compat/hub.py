"""huggingface_hub and datasets: switch to offline mode in a running process."""

from __future__ import annotations

import datasets
from huggingface_hub import constants


def go_offline() -> None:
    """Use only the cache for the rest of this process, as if it had started with HF_HUB_OFFLINE=1."""
    constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
