"""Interface of the kinds of linear layers, for all formats of their weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lightpeft.models.sharding import placed_like, whole


class LinearKind(ABC):
    """Access to one kind of linear layer: reading its weight, and cutting it."""

    @abstractmethod
    def matches(self, layer: Any) -> bool:
        """Return whether `layer` is of this kind."""

    @abstractmethod
    def dense_weight(self, layer: Any) -> Tensor:
        """Return the weight as a floating-point [out, in] tensor, a view where possible."""

    @abstractmethod
    def stored_weight(self, layer: Any) -> Tensor:
        """Return the stored numbers of the weight, [out, in], which do not change while the model runs."""

    @abstractmethod
    def features(self, layer: Any) -> tuple[int, int]:
        """Return the numbers of output and input features, without dequantizing the weight."""

    @abstractmethod
    def keep(self, layer: Any, index: Tensor, dim: int) -> None:
        """Keep output features (`dim` 0) or input features (`dim` 1), in place."""


class DenseKind(LinearKind):
    """Access to a layer with a floating-point weight."""

    def stored_weight(self, layer: Any) -> Tensor:
        """Return the weight itself, [out, in]."""
        return self.dense_weight(layer)


class QuantizedKind(LinearKind):
    """Access to a layer whose weight is stored as integers and scales.

    Cuts are bit-exact if the format has one scale for each row, or the cut removes whole blocks with their scales.
    Other cuts form new blocks (dequantize, cut, quantize), which rounds again.
    """

    def features(self, layer: Any) -> tuple[int, int]:
        return layer.out_features, layer.in_features

    def keep(self, layer: Any, index: Tensor, dim: int) -> None:
        if len(index):
            self._cut_weight(layer, index, dim)
        else:
            _make_empty(layer, dim)
        if dim == 0:
            layer.out_features = len(index)
            layer.bias = None if layer.bias is None else slice_parameter(layer.bias, index, 0)
        else:
            layer.in_features = len(index)

    @abstractmethod
    def _cut_weight(self, layer: Any, index: Tensor, dim: int) -> None:
        """Replace the weight by its rows or columns `index`, of which there is at least one."""


class EmptyLinear(nn.Linear):
    """Quantized layer that lost all input or all output features: only the bias remains."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., in] -> [..., out]."""
        result = x.new_zeros(*x.shape[:-1], self.out_features)
        return result if self.bias is None else result + self.bias.to(x.dtype)


def _make_empty(layer: Any, dim: int) -> None:
    rows, columns = (0, layer.in_features) if dim == 0 else (layer.out_features, 0)
    weight = torch.empty(rows, columns, device=layer.weight.device)
    layer.__class__ = EmptyLinear
    layer.weight = nn.Parameter(weight, requires_grad=False)


def slice_parameter(parameter: Tensor, index: Tensor, dim: int) -> nn.Parameter:
    """Make a parameter of the entries `index` along `dim`, trainable and sharded like the given one."""
    kept = whole(parameter).index_select(dim, index.to(parameter.device))
    return nn.Parameter(placed_like(kept, parameter), requires_grad=parameter.requires_grad)
