"""Computing the frozen prefix once for every training row."""

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
from rich.filesize import decimal
from torch import Tensor

from lightpeft.console import bars
from lightpeft.errors import LightPeftError
from lightpeft.machine import autocasting, processes
from lightpeft.models.batches import without_labels
from lightpeft.training.prefix.blocks import FrozenPrefix
from lightpeft.training.prefix.keys import row_keys
from lightpeft.training.prefix.states import StateStore, store_bytes

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
_FILE = "states.bin"
_TRIED_ROWS = 16
"""Rows that are made into a batch twice, to see whether they always give the same tokens."""
_UNPADDED = "a batch is not one padded sequence a row"
_STATELESS = frozenset({"transformers", "trl", "lightpeft"})
"""Packages whose collators depend on their rows, and on random numbers, alone."""


@dataclass(frozen=True)
class PrefixCache:
    """How the outputs of the frozen prefix are kept."""

    place: Literal["memory", "file"] = "file"
    """In memory (of every process), or in a file that all processes of a run share."""
    limit: int = 16 * 2**30
    """Bytes that the states may take at most."""


@dataclass(frozen=True)
class CachedRows:
    """What the frozen prefix gives for the rows that were asked for, whatever batches they come in."""

    slots: Mapping[bytes, int]
    """Key of a row (`row_keys`) -> its place in the store."""
    store: StateStore

    def of(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """States of the rows of a call of the model, [batch, length, width]; None where one of them is not known."""
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
    """Compute the attached prefix for every row.

    Args:
        rows: encoded rows, [tokens] of each as `input_ids`.
        collator: makes padded batches with an `attention_mask`.
        folder: where a file goes.
        autocast: half precision to compute in, as training does; None: that of the weights.
        announce: told, before anything is computed, what it will take, or why there will be no cache.

    Returns:
        The states of the rows; None if they would not fit, differ with the padding of a batch, or if there is an
        `obstacle`.

    Raises:
        LightPeftError: the folder cannot be written.
    """
    reason = obstacle(rows, collator)
    if reason is not None:
        announce(f"no prefix cache: {reason}")
        return None
    caching = _Caching(prefix, rows, collator, batch_size, autocast)
    if not caching.slots:
        announce(f"no prefix cache: {_UNPADDED}")
        return None
    first = caching.compute_checked()
    if first is None:
        announce("no prefix cache: what the frozen blocks give for a row depends on the padding of its batch")
        return None
    dtype, width = first.dtype, first.shape[-1]
    size = store_bytes(caching.lengths, width, dtype)
    room, where = _room(settings, folder)
    blocks = len(prefix.blocks)
    if size > min(room, settings.limit):
        most = decimal(min(room, settings.limit))
        announce(f"no prefix cache: it would take {decimal(size)} of {where}, and may take {most}")
        return None
    file = None if settings.place == "memory" else folder / _FILE
    store = StateStore(caching.lengths, width, dtype, file)
    what = f"frozen blocks ({blocks}) computed once for {len(rows)} rows"
    announce(f"prefix cache: {what}, {decimal(size)} of {where}")
    try:
        caching.fill(store)
    except OSError as error:
        raise LightPeftError(f"cannot write the prefix cache to {folder}: {error.strerror or error}") from error
    return CachedRows(caching.slots, store)


class _Caching:
    """Runs the prefix over rows; of several rows with the same tokens, over the first."""

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
        """Key of a row -> slot; empty if rows cannot be told apart."""
        self.lengths: list[int] = []
        """Real tokens, by slot."""
        self._numbers: list[int] = []
        """The row that a slot is of."""
        self._learn()

    def _learn(self) -> None:
        """Find the rows that differ, by the batches that the collator makes of them."""
        ids = self.rows.with_format(None)["input_ids"][:]
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        for chunk in _chunks(order, self.batch_size):
            batch = self._batch(chunk)
            keys, lengths = row_keys(batch), batch["attention_mask"].bool().sum(1).tolist()
            if keys is None:  # unlike those that were tried
                self.slots.clear()
                return
            for number, key, length in zip(chunk, keys, lengths, strict=True):
                if key not in self.slots:
                    self.slots[key] = len(self.lengths)
                    self.lengths.append(length)
                    self._numbers.append(number)

    def _batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """What the model is called with for some rows."""
        return dict(without_labels(self.collator(_taken(self.rows, numbers))))

    def compute(self, slots: Sequence[int]) -> list[Tensor]:
        """States of the real tokens of some rows, [length, width] each."""
        batch = self._batch([self._numbers[slot] for slot in slots])
        mask = batch["attention_mask"].bool()
        inputs = {name: value.to(self.device) for name, value in batch.items()}
        with autocasting(self.device, self.autocast):
            states = self.prefix.compute(inputs)
        return [row[real] for row, real in zip(states.cpu(), mask, strict=True)]

    def compute_checked(self) -> Tensor | None:
        """States of one row; None if they are others in the company of a longer row."""
        shortest, longest = self.lengths.index(min(self.lengths)), self.lengths.index(max(self.lengths))
        alone, padded = self.compute([shortest])[0], self.compute([shortest, longest])[0]
        return alone if self._close(alone, padded) else None

    def _close(self, one: Tensor, other: Tensor) -> bool:
        """Equal but for the noise of computing in another batch, and of the data type.

        Tokens are compared as vectors: decoders have single channels of a thousand times the others' size, whose
        rounding reaches all of them through the norms.
        """
        tolerance = 0.05 if self.autocast or one.dtype != torch.float32 else 1e-3
        one, other = one.float(), other.float()
        return bool(((one - other).norm(dim=-1) <= tolerance * other.norm(dim=-1)).all())

    def fill(self, store: StateStore) -> None:
        """Compute all rows; several processes share a file's rows among them."""
        state = processes()
        if store.file is not None:
            store.file.parent.mkdir(parents=True, exist_ok=True)
        order = sorted(range(len(store.lengths)), key=store.lengths.__getitem__)
        chunks = [*_chunks(order, self.batch_size)]
        if store.file is not None:
            chunks = chunks[state.process_index :: state.num_processes]
        for chunk in bars.progress(chunks, len(chunks), "Prefix"):
            for slot, states in zip(chunk, self.compute(chunk), strict=True):
                store.write(slot, states)
        state.wait_for_everyone()


def obstacle(rows: Any, collator: Collate) -> str | None:
    """Why rows have no states that could be kept; None: they have.

    Collators that draw random numbers are found by asking twice, of which whoever trains notices nothing.
    """
    if not isinstance(rows, Dataset) or "input_ids" not in rows.column_names or not len(rows):
        return "the rows are no data set of tokens"
    if rows.format["type"] == "custom":
        return "the rows have a transform, which may give a row other tokens each time"
    picked = _taken(rows, range(min(_TRIED_ROWS, len(rows))))
    if getattr(picked[0]["input_ids"][0], "__len__", None) and not isinstance(picked[0]["input_ids"][0], Tensor):
        return "it keeps one sequence a row, and multiple choice reads one an option"
    with _undisturbed():
        trial = copy.deepcopy(collator)
        first, again = (row_keys(without_labels(trial(copy.deepcopy(picked)))) for _ in range(2))
    if first is None or again is None or len(first) != len(picked):
        return _UNPADDED
    return None if first == again else "a row does not give the same tokens each time"


def may_change(collator: Collate) -> str | None:
    """Why a collator may give a row other tokens later in training, or count its calls; None: it does not."""
    kind = collator if inspect.isfunction(collator) else type(collator)
    if kind.__module__.partition(".")[0] in _STATELESS:
        return None
    return f"the collator {kind.__name__} may give a row other tokens later; those of transformers and TRL do not"


def _taken(rows: Dataset, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Rows as a data loader takes them, in their format."""
    return list(rows.__getitems__(list(numbers)))


def _chunks(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside the block random numbers are drawn that count for nobody outside."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _room(settings: PrefixCache, folder: Path) -> tuple[int, str]:
    """Bytes that are free where the states would go, and what people call that place."""
    if settings.place == "memory":
        return psutil.virtual_memory().available, "memory"
    existing = next(place for place in (folder, *folder.parents) if place.is_dir())
    return shutil.disk_usage(existing).free, "disk"
