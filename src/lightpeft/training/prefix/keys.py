"""Keys of the prefix cache: digests of all inputs of a row that the frozen blocks read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightpeft.models.batches import LABELS

NOT_READ = frozenset({*LABELS, "shift_labels"})
"""Arguments of the model that only the loss reads."""
_BYTES = 16
_OUTPUTS = ("output_hidden_states", "output_attentions")
"""Options that request outputs of the skipped blocks."""


def row_keys(inputs: Mapping[str, Any]) -> list[bytes] | None:
    """Return a digest per row of all inputs that the model's blocks read, without padding and labels.

    Args:
        inputs: keyword arguments of the model: `input_ids` and `attention_mask` [rows, length], and others.

    Returns:
        Digests, [rows]; None if the inputs are not one padded sequence per row, cannot be split into rows, or request
        hidden states or attentions.

    Example:
        >>> ids = torch.tensor([[5, 6, 0], [5, 6, 7]])
        >>> one, other = row_keys({"input_ids": ids, "attention_mask": (ids > 0).long()})
        >>> one == row_keys({"input_ids": ids[:1, :2], "attention_mask": torch.ones(1, 2).long()})[0]
        True
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or ids.dim() != 2 or mask.shape != ids.shape:
        return None
    if any(inputs.get(name) for name in _OUTPUTS):
        return None
    read = {name: value for name, value in inputs.items() if not (name in NOT_READ or _is_option(value))}
    if not all(isinstance(value, Tensor) and len(value) == len(ids) for value in read.values()):
        return None
    on_host = {name: read[name].detach().cpu() for name in sorted(read)}
    real = mask.detach().cpu().bool()
    return [_digest({name: _of_row(value, row, real) for name, value in on_host.items()}) for row in range(len(ids))]


def _is_option(value: Any) -> bool:
    """Return True if an argument is an option of the call, and not data of rows."""
    return (
        value is None or isinstance(value, bool | int | float | str) or (isinstance(value, Tensor) and not value.dim())
    )


def _of_row(value: Tensor, row: int, real: Tensor) -> Tensor:
    """Return the part of a tensor for a row; of tensors [rows, length, ...] only the real tokens."""
    return value[row][real[row]] if value.shape[:2] == real.shape else value[row]


def _digest(read: Mapping[str, Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=_BYTES)
    for name, value in read.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()
