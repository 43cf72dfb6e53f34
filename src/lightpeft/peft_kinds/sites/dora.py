"""LoRA with weight decomposition (DoRA, Liu et al. 2024): a trained magnitude for every row of the adapted weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightpeft.compat.peft import forget_norms
from lightpeft.errors import require
from lightpeft.models.linears.kinds import slice_parameter
from lightpeft.models.linears.linear_kinds import dense_weight
from lightpeft.peft_kinds.sites.base import ReportOutputs, Tensors, observe_pair
from lightpeft.peft_kinds.sites.lora import DOWN, UP, LoraSite

_MAGNITUDE = "lora_magnitude_vector"
"""Name of m in PEFT's files."""


class DoraSite(LoraSite):
    """Access to `m * V x / ||V||` with V = W + scaling * B A, and one magnitude m and norm per row (DoRA, eq. 5)."""

    needs_base = True

    @classmethod
    def matches(cls, config: LoraConfig) -> bool:
        return super().matches(config) and config.use_dora

    @property
    def magnitude(self) -> Any:
        """PEFT's module that holds m as `weight`, [out]."""
        return self.layer.lora_magnitude_vector[self.adapter]

    def observe(self, report: ReportOutputs, counting: Callable[[], bool]) -> list[RemovableHandle]:
        """Hook the module to report its change of the frozen layer's output, and that output."""
        return observe_pair(self.base, self.magnitude, 1.0, report, counting)

    @torch.no_grad()
    def cut(self, index: Tensor, dim: int) -> None:
        """Keep features: rows keep their magnitude; removed columns shrink it with the norm, to keep `m / ||V||`."""
        if dim == 0:
            self.magnitude.weight = slice_parameter(self.magnitude.weight, index, 0)
        else:
            direction = dense_weight(self.base).float() + self.scaling * (self.up.float() @ self.down.float())
            self.magnitude.weight.mul_(direction[:, index].norm(dim=1) / direction.norm(dim=1))
        forget_norms(self.magnitude)
        super().cut(index, dim)

    def keep_ranks(self, index: Tensor) -> None:
        super().keep_ranks(index)
        forget_norms(self.magnitude)

    def expanded_to_dense(self, learned: Tensors, index: Tensor, dim: int) -> Tensors:
        """Expand to the dense layer: restored rows get the base's magnitude, restored columns keep `m / ||V||`."""
        wide, magnitude = super().expanded_to_dense(learned, index, dim), learned[_MAGNITUDE]
        require(not self.base.weight.is_meta, f"DoRA on {self.spec.name} needs the weights of the base; give base=")
        weight = dense_weight(self.base).float().cpu()
        if dim == 0:
            magnitude = weight.norm(dim=1).to(magnitude.dtype).index_copy(0, index, magnitude)
        else:
            direction = weight + self.scaling * (wide[UP].float() @ wide[DOWN].float())
            magnitude = magnitude * direction.norm(dim=1) / direction[:, index].norm(dim=1)
        return {**wide, _MAGNITUDE: magnitude}
