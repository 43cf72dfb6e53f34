"""Order of a trainer's training rows, and batches of rows as the trainer collates them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler

from lightpeft.compat.transformers import LengthGroupedSampler, used_columns
from lightpeft.profiling.live import Batch
from lightpeft.training.host import Host
from lightpeft.training.step_rows import rows_per_step
from lightpeft.training.teacher_logits import without_teacher_logits


class EpochOrder(Sampler):
    """Sampler with the order of a `LengthGroupedSampler`, drawn from the seed plus the number of the epoch."""

    def __init__(self, sampler: LengthGroupedSampler, seed: int, epoch: Callable[[], int]) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        return self.of_epoch(self.epoch())

    def of_epoch(self, epoch: int) -> Iterator[int]:
        """Return the row numbers in the order of an epoch."""
        self.sampler.generator = torch.Generator().manual_seed(self.seed + epoch)
        return iter(self.sampler)


def with_repeatable_order(sampler: Sampler | None, trainer: Host) -> Sampler | None:
    """Make a trainer's length-grouped order depend on seed and epoch only, for any number of processes.

    Samplers of other kinds are returned unchanged.
    """
    if not isinstance(sampler, LengthGroupedSampler):
        return sampler
    sampler.batch_size *= trainer.args.world_size
    sampler.lengths = list(sampler.lengths)  # a column of a dataset makes a new dataset for every item read
    return EpochOrder(sampler, trainer.args.seed, lambda: int(trainer.state.epoch or 0))


def rows_of_steps(trainer: Host, steps: int) -> set[int] | None:
    """Return the numbers of the training rows in the first `steps` optimizer steps; None: the order is not known."""
    order = trainer._get_train_sampler(trainer.train_dataset)
    if not isinstance(order, EpochOrder):
        return None
    return set(itertools.islice(order.of_epoch(0), steps * rows_per_step(trainer.args)))


def batches_of(rows: Any, trainer: Host, numbers: Sequence[int], size: int) -> list[Batch]:
    """Collate rows as a trainer does, in batches of rows of similar length and in random order, without teacher logits.

    Args:
        rows: the dataset.
        numbers: row numbers to take.
        size: rows per batch.
    """
    lengths = rows["length"][:] if isinstance(rows, Dataset) and "length" in rows.column_names else None
    order = list(numbers) if lengths is None else sorted(numbers, key=lengths.__getitem__)
    if isinstance(rows, Dataset):
        rows = without_teacher_logits(used_columns(trainer, rows))
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    batches = [trainer.data_collator([rows[number] for number in part]) for part in parts]
    mixed = torch.randperm(len(batches), generator=torch.Generator().manual_seed(trainer.args.seed)).tolist()
    return [batches[index] for index in mixed]
