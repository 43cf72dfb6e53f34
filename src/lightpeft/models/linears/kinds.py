"""What a sort of linear layer has to say of its layers, whatever they keep their weight as."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lightpeft.models.sharding import placed_like, whole


class LinearKind(ABC):
    """How one kind of linear layer is read and cut."""

    @abstractmethod
    def matches(self, layer: Any) -> bool:
        """Whether `layer` is of this kind."""

    @abstractmethod
    def dense_weight(self, layer: Any) -> Tensor:
        """The weight as a floating-point [out, in] tensor, a view where possible."""

    @abstractmethod
    def stored_weight(self, layer: Any) -> Tensor:
        """The numbers that the weight is kept as, [out, in]; they stay as they are while the model runs."""

    @abstractmethod
    def features(self, layer: Any) -> tuple[int, int]:
        """Output and input features, without dequantising anything."""

    @abstractmethod
    def keep(self, layer: Any, index: Tensor, dim: int) -> None:
        """Keep output features (`dim` 0) or input features (`dim` 1), in place."""


class DenseKind(LinearKind):
    """How a layer whose weight is kept in floating point is read and cut."""

    def stored_weight(self, layer: Any) -> Tensor:
        """The weight itself."""
        return self.dense_weight(layer)


class QuantisedKind(LinearKind):
    """How a layer whose weight is kept as integers and scales is read and cut.

    Where a format keeps one scale a row, or a cut takes whole blocks with their scales, what stays is what was there,
    to the bit. Elsewhere blocks with scales of their own are formed anew (dequantise, cut, quantise), which rounds once
    more.
    """

    def features(self, layer: Any) -> tuple[int, int]:
        return layer.out_features, layer.in_features

    def keep(self, layer: Any, index: Tensor, dim: int) -> None:
        if len(index):
            self._cut_weight(layer, index, dim)
        else:
            _empty(layer, dim)
        if dim == 0:
            layer.out_features = len(index)
            layer.bias = None if layer.bias is None else sliced(layer.bias, index, 0)
        else:
            layer.in_features = len(index)

    @abstractmethod
    def _cut_weight(self, layer: Any, index: Tensor, dim: int) -> None:
        """Replace the weight by its rows or columns `index`, of which there is at least one."""


class EmptyLinear(nn.Linear):
    """What is left of a quantised layer without input or without output features: nothing to quantise, and the bias."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        result = x.new_zeros(*x.shape[:-1], self.out_features)
        return result if self.bias is None else result + self.bias.to(x.dtype)


def _empty(layer: Any, dim: int) -> None:
    rows, columns = (0, layer.in_features) if dim == 0 else (layer.out_features, 0)
    weight = torch.empty(rows, columns, device=layer.weight.device)
    layer.__class__ = EmptyLinear
    layer.weight = nn.Parameter(weight, requires_grad=False)


def sliced(parameter: Tensor, index: Tensor, dim: int) -> nn.Parameter:
    """A parameter of the entries `index` along `dim`, which trains if the whole one does, and is sharded if that is."""
    kept = whole(parameter).index_select(dim, index.to(parameter.device))
    return nn.Parameter(placed_like(kept, parameter), requires_grad=parameter.requires_grad)
