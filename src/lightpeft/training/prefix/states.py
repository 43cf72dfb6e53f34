"""Hidden states of every row, without padding, in memory or in a file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class StateStore:
    """Store of token vectors, row by row: row i is [lengths[i], width].

    A file is read row by row instead of being memory-mapped, so that it does not count as the process's memory; the
    system's page cache keeps as much as fits. Several processes may write different rows of one file.
    """

    def __init__(self, lengths: Sequence[int], width: int, dtype: torch.dtype, file: Path | None) -> None:
        """
        Args:
            lengths: tokens of each row.
            width: channels per token.
            file: file of the states; None: keep them in memory.
        """
        self.lengths, self.width, self.dtype, self.file = list(lengths), width, dtype, file
        self.starts = [0, *itertools.accumulate(self.lengths)]
        self._handle: FileIO | None = None
        self._owner = 0
        self._memory = torch.empty(self.starts[-1], width, dtype=dtype) if file is None else None

    def write(self, row: int, states: Tensor) -> None:
        """Store the states of a row, [lengths[row], width]."""
        states = states.to(device="cpu", dtype=self.dtype).contiguous()
        if self._memory is not None:
            self._memory[self.starts[row] : self.starts[row + 1]] = states
            return
        file = self._open(row)
        raw = _raw(states)
        while raw:
            raw = raw[file.write(raw) :]

    def read(self, row: int) -> Tensor:
        """Return the states of a row, [lengths[row], width]."""
        if self._memory is not None:
            return self._memory[self.starts[row] : self.starts[row + 1]]
        states = torch.empty(self.lengths[row], self.width, dtype=self.dtype)
        raw = _raw(states)
        if self._open(row).readinto(raw) != len(raw):
            raise OSError(f"{self.file} is shorter than expected; delete it and train again")
        return states

    def padded(self, rows: Sequence[int], mask: Tensor) -> Tensor:
        """Return the states of several rows at the real tokens of a padded batch, and zeros at padding.

        Args:
            mask: [batch, length], nonzero for real tokens; padding may be on either side.

        Returns:
            States, [batch, length, width].
        """
        batch = torch.zeros(*mask.shape, self.width, dtype=self.dtype)
        batch[mask.bool()] = torch.cat([self.read(row) for row in rows])
        return batch

    def _open(self, row: int) -> FileIO:
        """Open the file at the position of a row; each process needs its own handle, because forks share a position."""
        assert self.file is not None
        if self._handle is None or self._owner != os.getpid():
            self.file.touch()
            self._handle, self._owner = FileIO(self.file, "r+"), os.getpid()
        self._handle.seek(self.starts[row] * self.width * self.dtype.itemsize)
        return self._handle

    def __getstate__(self) -> dict[str, Any]:
        """Pickle for workers of a data loader, which open the file themselves."""
        return {**vars(self), "_handle": None}

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def __del__(self) -> None:
        """Close the file when nothing refers to the store any more."""
        self.close()


def _raw(states: Tensor) -> memoryview:
    """Return a view of the bytes of a contiguous tensor."""
    return memoryview(states.flatten().view(torch.uint8).numpy().data)


def store_bytes(lengths: Sequence[int], width: int, dtype: torch.dtype) -> int:
    """Return the size in bytes of the states of rows with these lengths, in tokens."""
    return sum(lengths) * width * dtype.itemsize
