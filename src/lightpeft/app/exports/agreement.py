"""How near what another program computes from a file is to what the model computes here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """How near two models are on the same inputs."""

    difference: float
    """Norm of the difference of their logits over that of the model's own."""
    same: bool
    """Whether both find the same class, or token, most probable everywhere."""

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor, Tensor]]) -> Self:
        """Compare logits [..., classes], the model's own and the other program's, of one batch or several."""
        size = torch.cat([own.flatten() for own, _ in pairs]).norm()
        apart = torch.cat([(theirs - own).flatten() for own, theirs in pairs]).norm()
        same = all(own.argmax(-1).equal(theirs.argmax(-1)) for own, theirs in pairs)
        return cls(float(apart / size), same)
