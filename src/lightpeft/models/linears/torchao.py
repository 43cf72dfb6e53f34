"""Linear layers with a weight that torchao quantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightpeft.compat.torchao import is_weight_only, of_parts, quantised_like
from lightpeft.models.linears.kinds import QuantisedKind


class TorchaoLinear(QuantisedKind):
    """`nn.Linear` with a torchao weight in plain layout: integers in the weight's shape, one scale a row or a group.

    Weight-only kinds; with quantised activations there is no gradient to the layer's input. Cuts are exact but for
    single columns of grouped weights, whose groups are formed anew.
    """

    def matches(self, layer: Any) -> bool:
        return isinstance(layer, nn.Linear) and is_weight_only(layer.weight)

    def dense_weight(self, layer: Any) -> Tensor:
        return layer.weight.dequantize().float()

    def stored_weight(self, layer: Any) -> Tensor:
        return layer.weight.qdata

    def fault(self, layer: Any, width: int, dim: int) -> str | None:
        group = _group_size(layer.weight)
        if dim == 0 or group is None or width % group == 0:
            return None
        return f"{width} input features are no multiple of the {group} weights that share a scale"

    def _cut_weight(self, layer: Any, index: Tensor, dim: int) -> None:
        layer.weight = nn.Parameter(_cut_torchao(layer.weight, index, dim), requires_grad=False)


def _group_size(weight: Any) -> int | None:
    """Weights of a row that share a scale; None: all."""
    group = weight.block_size[1]
    return group if group < weight.shape[1] else None


def _cut_torchao(weight: Any, index: Tensor, dim: int) -> Tensor:
    """Rows (`dim` 0) or columns (`dim` 1) of a torchao tensor, of the same kind."""
    block = weight.block_size[dim]
    scale_index: Tensor | None = index // block if block < weight.shape[dim] else None  # None: one scale for all
    if scale_index is not None and block > 1:
        scale_index = _whole_blocks(index, block)
        if scale_index is None:
            return quantised_like(weight, weight.dequantize().index_select(1, index))
    size = list(weight.block_size)
    size[dim] = block if scale_index is not None else len(index)
    scale, zero_point = (
        value if value is None or scale_index is None else value.index_select(dim, scale_index)
        for value in (weight.scale, weight.zero_point)
    )
    return of_parts(weight, weight.qdata.index_select(dim, index), scale, zero_point, size)


def _whole_blocks(index: Tensor, block: int) -> Tensor | None:
    """The blocks that `index` consists of; None if it takes a part of one only."""
    if len(index) % block:
        return None
    starts = index[::block]
    whole = starts.unsqueeze(1) + torch.arange(block, device=index.device)
    return starts // block if bool((starts % block == 0).all()) and whole.flatten().equal(index) else None
