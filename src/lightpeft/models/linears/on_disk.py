"""Linear layers whose weight stays in its file: it is read where it is needed, and is gone again afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import Conv1D

from lightpeft.compat.torch import set_without_hooks
from lightpeft.errors import LightPeftError
from lightpeft.models.linears.kinds import DenseKind
from lightpeft.models.linears.plain import PlainLinear, TransposedLinear
from lightpeft.models.tensors import StoredTensor


class OverFile(nn.Parameter):
    """A frozen parameter that lies over a file, and that nobody can write to, because what was written would be lost.

    It is an inference tensor, of which PyTorch allows no change in place; and `data`, by which PEFT merges, is a copy
    that cannot be set.
    """

    @property
    def data(self) -> Tensor:
        """A copy."""
        return self.detach().clone()

    @data.setter
    def data(self, values: Tensor) -> None:
        raise LightPeftError("weights on disk cannot be written to, nor PEFT merged into them; load them into memory")


class WeightOnDisk(nn.Module):
    """What a layer has whose weight stays on disk.

    `weight` is there for whoever asks for its shape and data type, or reads a few values: it lies over the file, and
    nothing of it is in memory before it is touched. What computes with it asks for `read`, and lets go of that again:
    so does the backward pass, for which no weight is kept.
    """

    stored: StoredTensor
    """Where the weight is."""
    place: Tensor
    """Without elements: of the device and the data type in which the layer computes."""

    def read(self) -> Tensor:
        """The weight, as the layer's class has it, to be let go of after use; on the CPU it is not even copied.

        Raises:
            LightPeftError: its file has been changed.
        """
        self.stored.check_unchanged()
        return self.stored.mapped().to(self.place)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return _Product.apply(x, self.bias, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightOnDisk:
        twin = type(self).__new__(type(self))
        memo[id(self)], memo[id(self.weight)] = twin, self.weight
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightOnDisk:
        """What `to` and its kin call: the weight stays where it is, and is read to where the layer goes."""
        weight = self.weight
        set_without_hooks(self, "weight", None)
        try:
            super()._apply(fn, recurse)
        finally:
            set_without_hooks(self, "weight", weight)
        self.place = fn(self.place)
        return self


class LinearOnDisk(WeightOnDisk, nn.Linear):
    """PyTorch's `Linear` with its weight on disk."""


class Conv1DOnDisk(WeightOnDisk, Conv1D):
    """transformers' `Conv1D` with its weight, [in, out], on disk."""


_CLASSES: dict[type, type[WeightOnDisk]] = {nn.Linear: LinearOnDisk, Conv1D: Conv1DOnDisk}


class _Product(torch.autograd.Function):
    """A layer's output; the backward pass reads the weight once more."""

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
    """A layer of PyTorch's or transformers' with its weight on disk; once it is cut, it is an ordinary one."""

    def matches(self, layer: Any) -> bool:
        return isinstance(layer, WeightOnDisk)

    def dense_weight(self, layer: Any) -> Tensor:
        weight = layer.read()
        return weight if isinstance(layer, nn.Linear) else weight.T

    def features(self, layer: Any) -> tuple[int, int]:
        return _usual(layer).features(layer)

    def keep(self, layer: Any, index: Tensor, dim: int) -> None:
        bring_in(layer)
        _usual(layer).keep(layer, index.to(layer.weight.device), dim)


def _usual(layer: nn.Module) -> DenseKind:
    """How a layer of the same class is cut whose weight is in memory."""
    return PlainLinear() if isinstance(layer, nn.Linear) else TransposedLinear()


def is_on_disk(layer: nn.Module) -> bool:
    """Whether the layer's weight is on disk."""
    return isinstance(layer, WeightOnDisk)


def can_be_left(layer: nn.Module) -> bool:
    """Whether `leave_on_disk` takes the layer: one of a subclass may do more with its weight."""
    return type(layer) in _CLASSES


def leave_on_disk(layer: Any, stored: StoredTensor, dtype: torch.dtype) -> None:
    """Let a linear layer whose weight lies over a file (`lying_over`), in place, read it where it is needed.

    Args:
        stored: where it lies, as the layer's class has it, in whatever data type.
        dtype: that in which the layer computes.
    """
    layer.stored, layer.place = stored, torch.empty(0, dtype=dtype)
    layer.__class__ = _CLASSES[type(layer)]


def lying_over(stored: StoredTensor) -> nn.Parameter:
    """A frozen parameter over a file, which nobody can write to."""
    with torch.inference_mode():
        return OverFile(stored.mapped(), requires_grad=False)


def bring_in(layer: Any) -> None:
    """Turn a layer whose weight is on disk into an ordinary one, in place; others are left as they are."""
    if isinstance(layer, WeightOnDisk):
        weight = nn.Parameter(layer.read(), requires_grad=False)
        layer.__class__ = next(usual for usual, own in _CLASSES.items() if type(layer) is own)
        layer.weight = weight
        del layer.stored, layer.place
