"""Linear layers whose weight stays in its file: each use reads it and frees it afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import Conv1D

from lightpeft.compat.torch import set_unseen
from lightpeft.errors import LightPeftError
from lightpeft.models.linears.kinds import DenseKind
from lightpeft.models.linears.plain import PlainLinear, TransposedLinear
from lightpeft.models.tensors import StoredTensor


class OverFile(nn.Parameter):
    """Frozen parameter that is mapped from a file and cannot be written to, because changes would be lost.

    It is an inference tensor, which PyTorch does not change in place; `data`, by which PEFT merges, is a copy that
    cannot be set.
    """

    @property
    def data(self) -> Tensor:
        """Copy of the values."""
        return self.detach().clone()

    @data.setter
    def data(self, values: Tensor) -> None:
        raise LightPeftError("weights on disk cannot be changed, so PEFT cannot merge; load the model into memory")


class WeightOnDisk(nn.Module):
    """Base class of layers whose weight stays on disk.

    `weight` is mapped from the file, for access to its shape, data type or a few values; no page is in memory before it
    is touched. Computations call `read` and drop the result; the backward pass reads the weight again.
    """

    stored: StoredTensor
    """Place of the weight on disk."""
    place: Tensor
    """Tensor without elements, with the device and the data type of the layer's computation."""

    def read(self) -> Tensor:
        """Read the weight in the layout of the layer's class; on the CPU without a copy. Drop it after use.

        Raises:
            LightPeftError: the file has changed.
        """
        self.stored.check_unchanged()
        return self.stored.mapped().to(self.place)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., in] -> [..., out]."""
        return _Product.apply(x, self.bias, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightOnDisk:
        twin = type(self).__new__(type(self))
        memo[id(self)], memo[id(self.weight)] = twin, self.weight
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightOnDisk:
        """Move the layer (for `to` and similar methods): the weight stays on disk, and `read` returns it as moved."""
        weight = self.weight
        set_unseen(self, "weight", None)
        try:
            super()._apply(fn, recurse)
        finally:
            set_unseen(self, "weight", weight)
        self.place = fn(self.place)
        return self


class LinearOnDisk(WeightOnDisk, nn.Linear):
    """PyTorch's `Linear` with its weight, [out, in], on disk."""


class Conv1DOnDisk(WeightOnDisk, Conv1D):
    """transformers' `Conv1D` with its weight, [in, out], on disk."""


_CLASSES: dict[type, type[WeightOnDisk]] = {nn.Linear: LinearOnDisk, Conv1D: Conv1DOnDisk}


class _Product(torch.autograd.Function):
    """Compute the output of a layer; the backward pass reads the weight again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: WeightOnDisk) -> Tensor:
        """
        Args:
            x: [..., in].
            bias: [out], or None; it may train.
        """
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        if isinstance(layer, nn.Linear):
            return functional.linear(x, layer.read(), bias)
        assert bias is not None
        return torch.addmm(bias, x.flatten(0, -2), layer.read()).view(*x.shape[:-1], -1)  # as Conv1D does

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows = gradient.flatten(0, -2)
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            weight = ctx.layer.read().to(gradient.dtype)
            of_x = rows @ (weight if isinstance(ctx.layer, nn.Linear) else weight.T)
            of_x = of_x.view(ctx.shape).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = rows.sum(0).to(ctx.bias_dtype)
        return of_x, of_bias, None


class OnDiskLinear(DenseKind):
    """Access to a layer with its weight on disk; a cut turns it into an ordinary layer."""

    def matches(self, layer: Any) -> bool:
        return isinstance(layer, WeightOnDisk)

    def dense_weight(self, layer: Any) -> Tensor:
        weight = layer.read()
        return weight if isinstance(layer, nn.Linear) else weight.T

    def features(self, layer: Any) -> tuple[int, int]:
        return _in_memory_kind(layer).features(layer)

    def keep(self, layer: Any, index: Tensor, dim: int) -> None:
        load_weight(layer)
        _in_memory_kind(layer).keep(layer, index.to(layer.weight.device), dim)


def _in_memory_kind(layer: nn.Module) -> DenseKind:
    """Return the kind of the same layer with its weight in memory."""
    return PlainLinear() if isinstance(layer, nn.Linear) else TransposedLinear()


def is_on_disk(layer: nn.Module) -> bool:
    """Return whether the layer's weight is on disk."""
    return isinstance(layer, WeightOnDisk)


def can_be_left(layer: nn.Module) -> bool:
    """Return whether `leave_on_disk` accepts the layer; subclasses may use their weight in other ways."""
    return type(layer) in _CLASSES


def leave_on_disk(layer: Any, stored: StoredTensor, dtype: torch.dtype) -> None:
    """Turn a linear layer whose weight is mapped from a file (`map_parameter`) into a layer on disk, in place.

    Args:
        stored: place of the weight on disk, in the layout of the layer's class and any data type.
        dtype: data type of the layer's computation.
    """
    layer.stored, layer.place = stored, torch.empty(0, dtype=dtype)
    layer.__class__ = _CLASSES[type(layer)]


def map_parameter(stored: StoredTensor) -> nn.Parameter:
    """Map a frozen parameter from a file; it cannot be written to."""
    with torch.inference_mode():
        return OverFile(stored.mapped(), requires_grad=False)


def load_weight(layer: Any) -> None:
    """Turn a layer whose weight is on disk into an ordinary one, in place; other layers do not change."""
    if isinstance(layer, WeightOnDisk):
        weight = nn.Parameter(layer.read(), requires_grad=False)
        layer.__class__ = next(usual for usual, own in _CLASSES.items() if type(layer) is own)
        layer.weight = weight
        del layer.stored, layer.place
