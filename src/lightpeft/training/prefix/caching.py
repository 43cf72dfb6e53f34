"""Computing the frozen prefix once for every training row, and giving batches its outputs."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from datasets import Dataset
from rich.filesize import decimal
from torch import Tensor

from lightpeft.console import bars
from lightpeft.errors import LightPeftError
from lightpeft.files import file_checksum, read_json, write_json
from lightpeft.machine import autocasting, processes
from lightpeft.tasks.tokens import without_labels
from lightpeft.training.prefix.blocks import FrozenPrefix
from lightpeft.training.prefix.states import StateStore, store_bytes

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
_FACTS = "states.json"
_FILE = "states.bin"
_STATES_CHECKSUM = "states"
_TRIED_ROWS = 16
"""Rows that are made into a batch twice, to see whether they always give the same tokens."""
_CHECKED_ROWS = 8
"""Rows of a stored cache that are computed again before it is taken over."""


@dataclass(frozen=True)
class PrefixCache:
    """How the outputs of the frozen prefix are kept."""

    place: Literal["memory", "file"] = "file"
    """In memory (of every process), or in a file that all processes of a run share."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: as the prefix gives them, so that training is the same to float noise; else rounded."""
    limit: int = 16 * 2**30
    """Bytes that the states may take at most."""

    def stored_dtype(self, computed: torch.dtype) -> torch.dtype:
        """The data type that states of type `computed` are kept in."""
        return computed if self.dtype == "auto" else getattr(torch, self.dtype)


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
) -> StateStore | None:
    """Compute the attached prefix for every row, or take over what an interrupted run left in `folder`.

    Args:
        rows: encoded rows; a column `length` saves counting their tokens.
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
    first = caching.compute_checked()
    if first is None:
        announce("no prefix cache: what the frozen blocks give for a row depends on the padding of its batch")
        return None
    dtype = settings.stored_dtype(first.dtype)
    lengths, width = lengths_of(rows), first.shape[-1]
    size = store_bytes(lengths, width, dtype)
    room, where = _room(settings, folder)
    blocks = len(prefix.blocks)
    if size > min(room, settings.limit):
        most = decimal(min(room, settings.limit))
        announce(f"no prefix cache: it would take {decimal(size)} of {where}, and may take {most}")
        return None
    file = None if settings.place == "memory" else folder / _FILE
    store = StateStore(lengths, width, dtype, file)
    facts = {"rows": _digest(rows), "width": width, "dtype": str(dtype), "blocks": blocks, "autocast": str(autocast)}
    try:
        if file is not None and caching.matches(store, folder / _FACTS, facts):
            announce(f"prefix cache: {decimal(size)} of {where}, from the interrupted run")
        else:
            what = f"frozen blocks ({blocks}) computed once for {len(rows)} rows"
            announce(f"prefix cache: {what}, {decimal(size)} of {where}")
            caching.fill(store, folder / _FACTS, facts)
    except OSError as error:
        raise LightPeftError(f"cannot write the prefix cache to {folder}: {error.strerror or error}") from error
    return store


class _Caching:
    """Runs the prefix over rows."""

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

    def compute(self, numbers: Sequence[int]) -> list[Tensor]:
        """States of the real tokens of some rows, [length, width] each."""
        batch = self.collator(self.rows.select(numbers).to_list())
        mask = batch["attention_mask"].bool()
        inputs = {name: value.to(self.device) for name, value in without_labels(batch).items()}
        with autocasting(self.device, self.autocast):
            states = self.prefix.compute(inputs)
        return [row[real] for row, real in zip(states.cpu(), mask, strict=True)]

    def compute_checked(self) -> Tensor | None:
        """States of one row; None if they are others in the company of a longer row."""
        lengths = lengths_of(self.rows)
        shortest, longest = lengths.index(min(lengths)), lengths.index(max(lengths))
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

    def fill(self, store: StateStore, facts_file: Path, facts: dict[str, Any]) -> None:
        """Compute all rows; several processes share a file's rows among them."""
        state = processes()
        state.wait_for_everyone()  # until all have seen what lies there
        if store.file is not None:
            store.file.parent.mkdir(parents=True, exist_ok=True)
            facts_file.unlink(missing_ok=True)
        order = sorted(range(len(self.rows)), key=store.lengths.__getitem__)
        chunks = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        if store.file is not None:
            chunks = chunks[state.process_index :: state.num_processes]
        for chunk in bars.progress(chunks, len(chunks), "Prefix"):
            for row, states in zip(chunk, self.compute(chunk), strict=True):
                store.write(row, states)
        state.wait_for_everyone()
        if store.file is not None and state.is_main_process:
            write_json(facts_file, {**facts, _STATES_CHECKSUM: file_checksum(store.file)})
        state.wait_for_everyone()

    def matches(self, store: StateStore, facts_file: Path, facts: dict[str, Any]) -> bool:
        """Whether what lies there was made by the same prefix from the same rows; some rows are computed to see."""
        try:
            stored = read_json(facts_file)
        except LightPeftError:  # none, or a damaged one
            return False
        assert store.file is not None
        if any(stored.get(name) != value for name, value in facts.items()) or not store.file.is_file():
            return False
        if store.file.stat().st_size != store.bytes or file_checksum(store.file) != stored.get(_STATES_CHECKSUM):
            return False
        step = max(1, len(self.rows) // _CHECKED_ROWS)
        numbers = list(range(0, len(self.rows), step))[:_CHECKED_ROWS]
        pairs = zip(self.compute(numbers), map(store.read, numbers), strict=True)
        return all(self._close(new.to(store.dtype), old) for new, old in pairs)


def lengths_of(rows: Dataset) -> list[int]:
    """Tokens of each row."""
    return list(rows["length"]) if "length" in rows.column_names else [len(ids) for ids in rows["input_ids"]]


def obstacle(rows: Any, collator: Collate) -> str | None:
    """Why rows have no states that could be kept; None: they have.

    Collators that draw random numbers are found by asking them twice.
    """
    if not isinstance(rows, Dataset) or "input_ids" not in rows.column_names or not len(rows):
        return "the rows are no data set of tokens"
    if isinstance(rows[0]["input_ids"][0], list):
        return "it keeps one sequence a row, and multiple choice reads one an option"
    picked = rows.select(range(min(_TRIED_ROWS, len(rows))))
    first, again = (collator(picked.to_list()) for _ in range(2))
    ids, mask = first.get("input_ids"), first.get("attention_mask")
    if (
        not isinstance(ids, Tensor)
        or not isinstance(mask, Tensor)
        or ids.shape[:1] != (len(picked),)
        or mask.dim() != 2
    ):
        return "a batch is not one padded sequence a row"
    same = ids.equal(again["input_ids"]) and mask.equal(again["attention_mask"])
    return None if same else "a row does not give the same tokens each time"


def _digest(rows: Dataset) -> str:
    """SHA-256 of the tokens of all rows, in order."""
    digest = hashlib.sha256()
    for ids in rows["input_ids"]:
        digest.update(repr(ids).encode())
    return digest.hexdigest()


def _room(settings: PrefixCache, folder: Path) -> tuple[int, str]:
    """Bytes that are free where the states would go, and what people call that place."""
    if settings.place == "memory":
        return psutil.virtual_memory().available, "memory"
    existing = next(place for place in (folder, *folder.parents) if place.is_dir())
    return shutil.disk_usage(existing).free, "disk"
