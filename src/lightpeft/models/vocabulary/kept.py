"""The tokens that stay, as plain data: ids of the base in ascending order, whose places there are their new ids."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightpeft.errors import require

_WEIGHTS = 2 ** torch.arange(8)
"""What each bit of a byte counts, the lowest first."""


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens of a base stay.

    Raises:
        LightPeftError: they are not ascending ids below `size`, or none.
    """

    kept: tuple[int, ...]
    """Ids in the base's vocabulary, ascending: the token `kept[i]` has the id `i` in the small one."""
    size: int
    """Rows of the base's input embeddings."""

    def __post_init__(self) -> None:
        ascending = all(before < after for before, after in zip(self.kept, self.kept[1:], strict=False))
        inside = bool(self.kept) and self.kept[0] >= 0 and self.kept[-1] < self.size
        require(ascending and inside, f"the tokens that stay are not ascending ids below {self.size:,}")

    def __len__(self) -> int:
        return len(self.kept)

    @cached_property
    def new_ids(self) -> dict[int, int]:
        """Id in the base -> id in the small vocabulary."""
        return {old: new for new, old in enumerate(self.kept)}

    def rows(self, table: Tensor, dim: int = 0) -> Tensor:
        """[..., size, ...] -> [..., kept, ...]; a table that is cut already stays as it is."""
        if table.shape[dim] == len(self.kept):
            return table
        return table.index_select(dim, torch.tensor(self.kept, device=table.device))

    def to_bits(self) -> Tensor:
        """One bit a token, [size / 8, rounded up], uint8: a few KiB, whatever stays."""
        mask = torch.zeros(-(-self.size // 8) * 8, dtype=torch.long)
        mask[list(self.kept)] = 1
        return (mask.view(-1, 8) * _WEIGHTS).sum(-1).to(torch.uint8)

    @classmethod
    def from_bits(cls, bits: Tensor, size: int) -> Vocabulary:
        """What `to_bits` wrote.

        Raises:
            LightPeftError: it is of another size, or nothing stays.
        """
        fits = bits.dtype == torch.uint8 and bits.shape == (-(-size // 8),)
        require(fits, f"these are not the tokens that stay of {size:,}")
        mask = (bits.long().unsqueeze(-1) & _WEIGHTS) > 0
        return cls(tuple(mask.flatten().nonzero().flatten().tolist()), size)
