"""Compute the frozen prefix once for every training row."""

from __future__ import annotations

import copy
import inspect
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from datasets import Dataset
from torch import Tensor

from lightpeft.console import bars
from lightpeft.console.progress import in_bytes
from lightpeft.errors import LightPeftError
from lightpeft.machine import autocasting, processes
from lightpeft.models.batches import without_labels
from lightpeft.training.prefix.blocks import FrozenPrefix
from lightpeft.training.prefix.keys import row_keys
from lightpeft.training.prefix.states import StateStore, store_bytes

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
_FILE = "states.bin"
_TRIED_ROWS = 16
"""Rows that are collated twice, to test if they always give the same tokens."""
_UNPADDED = "a batch does not have one padded sequence per row"
_STATELESS = frozenset({"transformers", "trl", "lightpeft"})
"""Packages whose collators depend only on their rows and on random numbers."""


@dataclass(frozen=True)
class PrefixCache:
    """Settings of the cache for the outputs of the frozen prefix."""

    place: Literal["memory", "file"] = "file"
    """Memory (of every process), or a file that all processes of a run share."""
    limit: int = 16 * 2**30
    """Largest size of the cache, in bytes."""


@dataclass(frozen=True)
class CachedRows:
    """Cached outputs of the frozen prefix, looked up row by row for any batch."""

    slots: Mapping[bytes, int]
    """Key of a row (`row_keys`) -> its place in the store."""
    store: StateStore

    def of(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the states for the rows of a model call, [batch, length, width]; None if any row is not cached."""
        keys = row_keys(inputs)
        if keys is None or not all(key in self.slots for key in keys):
            return None
        return self.store.padded([self.slots[key] for key in keys], inputs["attention_mask"].cpu())

    def close(self) -> None:
        """Close the file, if there is one."""
        self.store.close()


def cache_prefix(
    prefix: FrozenPrefix,
    rows: Dataset,
    collator: Collate,
    settings: PrefixCache,
    folder: Path,
    *,
    batch_size: int,
    autocast: torch.dtype | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> CachedRows | None:
    """Compute the attached prefix for every row, and cache the outputs.

    Args:
        rows: encoded rows with `input_ids`, [tokens].
        collator: makes padded batches with an `attention_mask`.
        settings: place and largest size of the cache.
        folder: folder of the cache file.
        batch_size: rows per forward pass.
        autocast: half precision to compute in, as training does; None: that of the weights.
        announce: called with one line, before the computation, about its size or the reason for no cache.

    Returns:
        The cache; None if it would not fit, if states depend on the padding of a batch, or if the rows or the collator
        cannot be cached.

    Raises:
        LightPeftError: the folder cannot be written.
    """
    reason = obstacle(rows, collator)
    if reason is not None:
        announce(f"no prefix cache: {reason}")
        return None
    caching = _PrefixRunner(prefix, rows, collator, batch_size, autocast)
    if not caching.slots:
        announce(f"no prefix cache: {_UNPADDED}")
        return None
    first = caching.compute_checked()
    if first is None:
        announce("no prefix cache: the output of the frozen blocks for a row depends on the padding of its batch")
        return None
    dtype, width = first.dtype, first.shape[-1]
    size = store_bytes(caching.lengths, width, dtype)
    room, where = _free_bytes(settings, folder)
    blocks = len(prefix.blocks)
    if size > min(room, settings.limit):
        most = in_bytes(min(room, settings.limit))
        announce(f"no prefix cache: it needs {in_bytes(size)} of {where}, and the limit is {most}")
        return None
    file = None if settings.place == "memory" else folder / _FILE
    store = StateStore(caching.lengths, width, dtype, file)
    what = f"{blocks} frozen block{'s' * (blocks > 1)} computed once for {len(rows)} rows"
    announce(f"prefix cache: {what}; their outputs take {in_bytes(size)} of {where}")
    try:
        caching.fill(store)
    except OSError as error:
        raise LightPeftError(f"cannot write the prefix cache to {folder}: {error.strerror or error}") from error
    return CachedRows(caching.slots, store)


class _PrefixRunner:
    """Runs the prefix over rows; rows with the same tokens share a slot, and run once."""

    def __init__(
        self,
        prefix: FrozenPrefix,
        rows: Dataset,
        collator: Collate,
        batch_size: int,
        autocast: torch.dtype | None,
    ) -> None:
        self.prefix, self.rows, self.collator = prefix, rows, collator
        self.batch_size, self.autocast = batch_size, autocast
        self.device = next(prefix.model.parameters()).device
        self.slots: dict[bytes, int] = {}
        """Key of a row -> slot; empty if rows have no keys."""
        self.lengths: list[int] = []
        """Number of real tokens, by slot."""
        self._numbers: list[int] = []
        """Number of the first row of each slot."""
        self._assign_slots()

    def _assign_slots(self) -> None:
        """Collate all rows, and assign a slot to each distinct key."""
        ids = self.rows.with_format(None)["input_ids"][:]
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        for chunk in _chunks(order, self.batch_size):
            batch = self._batch(chunk)
            keys, lengths = row_keys(batch), batch["attention_mask"].bool().sum(1).tolist()
            if keys is None:  # unlike the rows that `obstacle` has tried
                self.slots.clear()
                return
            for number, key, length in zip(chunk, keys, lengths, strict=True):
                if key not in self.slots:
                    self.slots[key] = len(self.lengths)
                    self.lengths.append(length)
                    self._numbers.append(number)

    def _batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Return the model's inputs for the rows with these numbers, without labels."""
        return dict(without_labels(self.collator(_fetch_rows(self.rows, numbers))))

    def compute(self, slots: Sequence[int]) -> list[Tensor]:
        """Compute the states of the real tokens for some slots, [length, width] each."""
        batch = self._batch([self._numbers[slot] for slot in slots])
        mask = batch["attention_mask"].bool()
        inputs = {name: value.to(self.device) for name, value in batch.items()}
        with autocasting(self.device, self.autocast):
            states = self.prefix.compute(inputs)
        return [row[real] for row, real in zip(states.cpu(), mask, strict=True)]

    def compute_checked(self) -> Tensor | None:
        """Compute the states of the shortest row; None if they change in a batch with the longest row."""
        shortest, longest = self.lengths.index(min(self.lengths)), self.lengths.index(max(self.lengths))
        alone, padded = self.compute([shortest])[0], self.compute([shortest, longest])[0]
        return alone if self._nearly_equal(alone, padded) else None

    def _nearly_equal(self, one: Tensor, other: Tensor) -> bool:
        """Return True if states are equal up to rounding.

        Tokens are compared as vectors: decoders have single channels a thousand times as large as the others, whose
        rounding errors reach all channels through the norms.
        """
        tolerance = 0.05 if self.autocast or one.dtype != torch.float32 else 1e-3
        one, other = one.float(), other.float()
        return bool(((one - other).norm(dim=-1) <= tolerance * other.norm(dim=-1)).all())

    def fill(self, store: StateStore) -> None:
        """Compute the states of all slots into a store; several processes split the slots of a file."""
        state = processes()
        if store.file is not None:
            store.file.parent.mkdir(parents=True, exist_ok=True)
        order = sorted(range(len(store.lengths)), key=store.lengths.__getitem__)
        chunks = [*_chunks(order, self.batch_size)]
        if store.file is not None:
            chunks = chunks[state.process_index :: state.num_processes]
        for chunk in bars.progress(chunks, len(chunks), "Prefix cache"):
            for slot, states in zip(chunk, self.compute(chunk), strict=True):
                store.write(slot, states)
        state.wait_for_everyone()


def obstacle(rows: Any, collator: Collate) -> str | None:
    """Return the reason why the outputs for these rows cannot be cached; None: they can.

    Collating some rows twice finds collators that draw random numbers. The random state is restored afterwards.
    """
    if not isinstance(rows, Dataset) or "input_ids" not in rows.column_names or not len(rows):
        return "the rows are not a datasets.Dataset with input_ids"
    if rows.format["type"] == "custom":
        return "the rows have a transform, which may change the tokens of a row each time"
    picked = _fetch_rows(rows, range(min(_TRIED_ROWS, len(rows))))
    if getattr(picked[0]["input_ids"][0], "__len__", None) and not isinstance(picked[0]["input_ids"][0], Tensor):
        return "it holds one sequence per row, and multiple choice has one per option"
    with _keeping_random_state():
        trial = copy.deepcopy(collator)
        first, again = (row_keys(without_labels(trial(copy.deepcopy(picked)))) for _ in range(2))
    if first is None or again is None or len(first) != len(picked):
        return _UNPADDED
    return None if first == again else "the tokens of a row change each time it is collated"


def may_change(collator: Collate) -> str | None:
    """Return the reason why a collator may change the tokens of a row during training; None: it does not."""
    kind = collator if inspect.isfunction(collator) else type(collator)
    if kind.__module__.partition(".")[0] in _STATELESS:
        return None
    return f"the collator {kind.__name__} may change the tokens of a row later; those of transformers and TRL do not"


def _fetch_rows(rows: Dataset, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Return the rows with these numbers in their format, as a data loader fetches them."""
    return list(rows.__getitems__(list(numbers)))


def _chunks(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))


@contextmanager
def _keeping_random_state() -> Iterator[None]:
    """Restore the random state of Python, NumPy and PyTorch after the block."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _free_bytes(settings: PrefixCache, folder: Path) -> tuple[int, str]:
    """Return the free bytes in the cache's place, and the name of that place."""
    if settings.place == "memory":
        return psutil.virtual_memory().available, "memory"
    existing = next(place for place in (folder, *folder.parents) if place.is_dir())
    return shutil.disk_usage(existing).free, "disk"
