"""Linear layers with a floating-point weight: PyTorch's `Linear`, and transformers' `Conv1D`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Conv1D

from lightpeft.compat.stand_ins import StandIn
from lightpeft.models.linears.kinds import DenseKind, slice_parameter
from lightpeft.models.sharding import whole


class PlainLinear(DenseKind):
    """Access to `torch.nn.Linear` with an ordinary floating-point weight."""

    def matches(self, layer: nn.Module) -> bool:
        weight: Any = getattr(layer, "weight", None)
        ours = type(weight) in (nn.Parameter, DTensor, StandIn)
        return isinstance(layer, nn.Linear) and ours and _is_ordinary(weight)

    def dense_weight(self, layer: Any) -> Tensor:
        return whole(layer.weight)

    def features(self, layer: Any) -> tuple[int, int]:
        rows, columns = layer.weight.shape
        return rows, columns

    def keep(self, layer: Any, index: Tensor, dim: int) -> None:
        layer.weight = slice_parameter(layer.weight, index, dim)
        if dim == 0:
            layer.out_features = len(index)
            layer.bias = None if layer.bias is None else slice_parameter(layer.bias, index, 0)
        else:
            layer.in_features = len(index)


class TransposedLinear(DenseKind):
    """Access to transformers' `Conv1D`, a linear layer whose weight is [in, out] (GPT-2)."""

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, Conv1D)

    def dense_weight(self, layer: Any) -> Tensor:
        return whole(layer.weight).T

    def features(self, layer: Any) -> tuple[int, int]:
        columns, rows = layer.weight.shape
        return rows, columns

    def keep(self, layer: Any, index: Tensor, dim: int) -> None:
        layer.weight = slice_parameter(layer.weight, index, 1 - dim)
        if dim == 0:
            layer.bias = slice_parameter(layer.bias, index, 0)
            layer.nf = len(index)
        else:
            layer.nx = len(index)
            if not len(index):
                layer.__class__ = WithoutInputs


class WithoutInputs(Conv1D):
    """`Conv1D` that lost all inputs: only its bias remains. (PyTorch's `Linear` supports this itself.)"""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., 0] -> [..., out]."""
        return self.bias.expand(*x.shape[:-1], self.nf)


def _is_ordinary(weight: Tensor) -> bool:
    """Return whether a weight is a plain, sharded or stand-in tensor of PyTorch, and no float8, which needs scales."""
    wide = weight.is_floating_point() and weight.dtype.itemsize > 1
    return wide and (type(weight) is StandIn or type(weight.data) in (Tensor, DTensor))
