"""Training rows and held-out test rows: the hold-out split, and the limits."""

from __future__ import annotations

from datasets import Dataset

from lightpeft.config import DataConfig
from lightpeft.errors import require

SPLIT_SEED = 0
"""Seed of the hold-out split and the limits; independent of the run's seed, so that all seeds share one test set."""


def split_rows(train: Dataset, test: Dataset | None, config: DataConfig) -> tuple[Dataset, Dataset]:
    """Return training and test rows after the hold-out split and the limits; a pure function of rows and config."""
    if test is None:
        kept = int(len(train) * (1 - config.test_fraction))
        require(
            kept >= 1,
            f"data.train has {len(train)} row(s), too few to hold out {config.test_fraction:g} of them; add rows",
        )
        parts = train.train_test_split(
            config.test_fraction, seed=SPLIT_SEED, keep_in_memory=True, load_from_cache_file=False
        )
        train, test = parts["train"], parts["test"]
    return limit_rows(train, config.limit_train), limit_rows(test, config.limit_test)


def limit_rows(rows: Dataset, limit: int | None) -> Dataset:
    """Return the first `limit` rows after a shuffle with `SPLIT_SEED`; all rows if `limit` is None."""
    if limit is None:
        return rows
    shuffled = rows.shuffle(seed=SPLIT_SEED, keep_in_memory=True, load_from_cache_file=False)
    return shuffled.select(range(min(limit, len(rows))))
