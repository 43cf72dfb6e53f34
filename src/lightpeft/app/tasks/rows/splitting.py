"""Which rows are trained on, and which are evaluated on: the hold-out split, and the limits."""

from __future__ import annotations

from datasets import Dataset

from lightpeft.config import DataConfig
from lightpeft.errors import require

SPLIT_SEED = 0
"""Chooses held-out and limited rows: independent of the run's seed, so that seeds share one test set."""


def split_rows(train: Dataset, test: Dataset | None, config: DataConfig) -> tuple[Dataset, Dataset]:
    """Training and test rows after the hold-out split and the limits; a pure function of rows and config."""
    if test is None:
        kept = int(len(train) * (1 - config.test_fraction))
        require(kept >= 1, f"data.train has {len(train)} row(s); too few to hold out {config.test_fraction:g} of them")
        parts = train.train_test_split(
            config.test_fraction, seed=SPLIT_SEED, keep_in_memory=True, load_from_cache_file=False
        )
        train, test = parts["train"], parts["test"]
    return limited(train, config.limit_train), limited(test, config.limit_test)


def limited(rows: Dataset, limit: int | None) -> Dataset:
    """So many rows, after a seeded shuffle; all of them without a limit."""
    if limit is None:
        return rows
    shuffled = rows.shuffle(seed=SPLIT_SEED, keep_in_memory=True, load_from_cache_file=False)
    return shuffled.select(range(min(limit, len(rows))))
