"""One view of linear layers: their width, their weight as [out, in], and how features are cut out of them.

PyTorch's `Linear` (and subclasses that only compute differently) and transformers' `Conv1D`, which keeps its weight
transposed, here; layers in 4 or 8 bits in `quantised`.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightpeft.errors import LightPeftError, require
from lightpeft.models.quantised import QUANTISED


class LinearKind(Protocol):
    """How one kind of linear layer is read and cut."""

    def matches(self, layer: nn.Module) -> bool:
        """Whether `layer` is of this kind."""
        ...

    def dense_weight(self, layer: nn.Module) -> Tensor:
        """The weight as a floating-point [out, in] tensor, a view where possible."""
        ...

    def stored_weight(self, layer: nn.Module) -> Tensor:
        """The numbers that the weight is kept as, [out, in]: the weight itself, or the integers of a quantised one."""
        return self.dense_weight(layer)

    def features(self, layer: nn.Module) -> tuple[int, int]:
        """Output and input features."""
        rows, columns = self.dense_weight(layer).shape
        return rows, columns

    def fault(self, layer: nn.Module, width: int, dim: int) -> str | None:
        """Why the layer cannot be cut to `width` output (`dim` 0) or input features (`dim` 1); None: it can."""
        return None

    def keep(self, layer: nn.Module, index: Tensor, dim: int) -> None:
        """Keep output features (`dim` 0) or input features (`dim` 1), in place."""
        ...


@runtime_checkable
class DenseKind(LinearKind, Protocol):
    """How a layer whose weight is kept in floating point is read, cut and added to."""

    def add(self, layer: nn.Module, delta: Tensor | None, bias: Tensor) -> None:
        """Give the layer a weight larger by `delta` [out, in], and a bias larger by `bias` [out]."""
        ...


class PlainLinear(DenseKind):
    """`torch.nn.Linear` with an ordinary floating-point weight."""

    def matches(self, layer: nn.Module) -> bool:
        weight = getattr(layer, "weight", None)
        return isinstance(layer, nn.Linear) and type(weight) is nn.Parameter and _is_ordinary(weight)

    def dense_weight(self, layer: Any) -> Tensor:
        return layer.weight.detach()

    def keep(self, layer: Any, index: Tensor, dim: int) -> None:
        layer.weight = sliced(layer.weight, index, dim)
        if dim == 0:
            layer.out_features = len(index)
            layer.bias = None if layer.bias is None else sliced(layer.bias, index, 0)
        else:
            layer.in_features = len(index)

    def add(self, layer: Any, delta: Tensor | None, bias: Tensor) -> None:
        layer.weight = _sum(layer.weight, delta)
        layer.bias = _sum(layer.bias, bias) if layer.bias is not None else _frozen(bias.to(layer.weight.dtype))


class TransposedLinear(DenseKind):
    """transformers' `Conv1D`: a linear layer whose weight is [in, out] (GPT-2)."""

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, Conv1D)

    def dense_weight(self, layer: Any) -> Tensor:
        return layer.weight.detach().T

    def keep(self, layer: Any, index: Tensor, dim: int) -> None:
        layer.weight = sliced(layer.weight, index, 1 - dim)
        if dim == 0:
            layer.bias = sliced(layer.bias, index, 0)
            layer.nf = len(index)
        else:
            layer.nx = len(index)
            if not len(index):
                layer.__class__ = WithoutInputs

    def add(self, layer: Any, delta: Tensor | None, bias: Tensor) -> None:
        layer.weight = _sum(layer.weight, None if delta is None else delta.T)
        layer.bias = _sum(layer.bias, bias)


class WithoutInputs(Conv1D):
    """A `Conv1D` that lost all its inputs: its bias is left. (PyTorch's `Linear` does this by itself.)"""

    def forward(self, x: Tensor) -> Tensor:
        """[..., 0] -> [..., out]."""
        return self.bias.expand(*x.shape[:-1], self.nf)


KINDS: list[LinearKind] = [PlainLinear(), TransposedLinear(), *QUANTISED]
"""The kinds of linear layers that can be cut."""


def is_linear(layer: nn.Module) -> bool:
    """Whether the layer is a linear layer that can be cut."""
    return any(kind.matches(layer) for kind in KINDS)


def dense_weight(layer: nn.Module) -> Tensor:
    """The layer's weight as an [out, in] tensor without a graph.

    Raises:
        LightPeftError: not a linear layer that can be cut.
    """
    return _kind(layer).dense_weight(layer)


def stored_weight(layer: nn.Module) -> Tensor:
    """What a linear layer keeps its weight as, [out, in]: the weight itself, or the integers of a quantised one."""
    return _kind(layer).stored_weight(layer)


def features(layer: nn.Module) -> tuple[int, int]:
    """Output and input features of a linear layer."""
    return _kind(layer).features(layer)


def fault(layer: nn.Module, width: int, dim: int) -> str | None:
    """Why a linear layer cannot be cut to `width` output (`dim` 0) or input features (`dim` 1); None: it can."""
    return _kind(layer).fault(layer, width, dim)


def describe(layer: nn.Module) -> str:
    """A layer's type for messages, with that of its weight where that is a type of its own."""
    weight = getattr(layer, "weight", None)
    own = "" if weight is None or type(weight) in (nn.Parameter, Tensor) else f" with a {_name(weight)} weight"
    return f"{_name(layer)}{own}"


@torch.no_grad()
def slice_linear(layer: Any, index: Tensor, dim: int) -> None:
    """Keep output features (`dim` 0) or input features (`dim` 1) of a linear layer; the rest is freed.

    Raises:
        LightPeftError: not a linear layer that can be cut, or not to this width; nothing was cut.
    """
    kind = _kind(layer)
    reason = kind.fault(layer, len(index), dim)
    require(reason is None, f"a {describe(layer)} cannot be cut: {reason}")
    kind.keep(layer, index.to(layer.weight.device), dim)


@torch.no_grad()
def add_to_linear(layer: Any, delta: Tensor | None, bias: Tensor) -> None:
    """Give a linear layer a weight that is larger by `delta` [out, in] and a bias that is larger by `bias` [out].

    The tensors that it held, which others may share, stay as they are; a layer without a bias gets one.

    Raises:
        LightPeftError: nothing can be added to a layer of this kind.
    """
    kind = _kind(layer)
    if not isinstance(kind, DenseKind):
        raise LightPeftError(f"nothing can be added to a {describe(layer)}")
    kind.add(layer, delta, bias)


def can_be_added_to(layer: nn.Module) -> bool:
    """Whether `add_to_linear` works: the weight is kept in floating point."""
    return isinstance(_kind(layer), DenseKind)


def _sum(parameter: nn.Parameter, change: Tensor | None) -> nn.Parameter:
    """A new parameter, added up in float32; it trains if the old one does."""
    if change is None:
        return parameter
    total = (parameter.detach().float() + change.float()).to(parameter.dtype)
    return nn.Parameter(total, requires_grad=parameter.requires_grad)


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def sliced(parameter: Tensor, index: Tensor, dim: int) -> nn.Parameter:
    """A parameter of the entries `index` along `dim`, which trains if the whole one does."""
    return nn.Parameter(parameter.detach().index_select(dim, index), requires_grad=parameter.requires_grad)


def _kind(layer: nn.Module) -> LinearKind:
    for kind in KINDS:
        if kind.matches(layer):
            return kind
    raise LightPeftError(f"a {describe(layer)} cannot be pruned")


def _name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__name__}"


def _is_ordinary(weight: Tensor) -> bool:
    return type(weight.data) is Tensor and weight.is_floating_point()
