"""The kept tokens as plain data: ids of the base in ascending order, whose positions are the new ids."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightpeft.errors import require

_BIT_VALUES = 2 ** torch.arange(8)
"""Values of the bits of a byte, lowest first."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a base to keep.

    Raises:
        LightPeftError: they are no ascending ids below `size`, or there are none.
    """

    kept: tuple[int, ...]
    """Ids in the base's vocabulary, ascending: the token `kept[i]` has the id `i` in the small one."""
    size: int
    """Rows of the base's input embeddings."""

    def __post_init__(self) -> None:
        ascending = all(before < after for before, after in zip(self.kept, self.kept[1:], strict=False))
        inside = bool(self.kept) and self.kept[0] >= 0 and self.kept[-1] < self.size
        require(ascending and inside, f"the tokens to keep are not ascending ids below {self.size:,}")

    def __len__(self) -> int:
        return len(self.kept)

    @cached_property
    def new_ids(self) -> dict[int, int]:
        """Id in the base -> id in the small vocabulary."""
        return {old: new for new, old in enumerate(self.kept)}

    def rows(self, table: Tensor, dim: int = 0) -> Tensor:
        """Select the kept rows of a table: [..., size, ...] -> [..., kept, ...]; a cut table does not change."""
        if table.shape[dim] == len(self.kept):
            return table
        return table.index_select(dim, torch.tensor(self.kept, device=table.device))

    def to_bits(self) -> Tensor:
        """Pack the kept tokens into one bit per token: [size / 8, rounded up], uint8."""
        mask = torch.zeros(-(-self.size // 8) * 8, dtype=torch.long)
        mask[list(self.kept)] = 1
        return (mask.view(-1, 8) * _BIT_VALUES).sum(-1).to(torch.uint8)

    @classmethod
    def from_bits(cls, bits: Tensor, size: int) -> Vocabulary:
        """Unpack bits of `to_bits`.

        Raises:
            LightPeftError: the bits have another size, or no token is kept.
        """
        fits = bits.dtype == torch.uint8 and bits.shape == (-(-size // 8),)
        require(fits, f"the list of kept tokens does not fit {size:,} tokens")
        mask = (bits.long().unsqueeze(-1) & _BIT_VALUES) > 0
        return cls(tuple(mask.flatten().nonzero().flatten().tolist()), size)
