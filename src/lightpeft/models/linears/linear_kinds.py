"""Functions on linear layers of any kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightpeft.errors import LightPeftError
from lightpeft.models.linears.bitsandbytes import EightBitLinear, FourBitLinear
from lightpeft.models.linears.kinds import LinearKind
from lightpeft.models.linears.on_disk import OnDiskLinear
from lightpeft.models.linears.plain import PlainLinear, TransposedLinear

LINEAR_KINDS: tuple[LinearKind, ...] = (
    OnDiskLinear(),  # before the plain ones, which match it as well
    PlainLinear(),
    TransposedLinear(),
    FourBitLinear(),
    EightBitLinear(),
)
"""Kinds of linear layers that can be cut; the first one that matches counts."""


def is_linear(layer: nn.Module) -> bool:
    """Return whether a layer is a linear layer that can be cut."""
    return any(kind.matches(layer) for kind in LINEAR_KINDS)


def dense_weight(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer as a floating-point [out, in] tensor without gradients.

    Raises:
        LightPeftError: the layer is no linear layer that can be cut.
    """
    return _kind(layer).dense_weight(layer)


def stored_weight(layer: nn.Module) -> Tensor:
    """Return the stored numbers of a linear layer's weight, [out, in]: its values, or the integers if quantized."""
    return _kind(layer).stored_weight(layer)


def features(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of output and input features of a linear layer."""
    return _kind(layer).features(layer)


def describe(layer: nn.Module) -> str:
    """Return the type of a layer for messages, with that of its weight if it is no plain parameter."""
    weight = getattr(layer, "weight", None)
    own = "" if weight is None or type(weight) in (nn.Parameter, Tensor) else f" with a {_name(weight)} weight"
    return f"{_name(layer)}{own}"


@torch.no_grad()
def slice_linear(layer: Any, index: Tensor, dim: int) -> None:
    """Keep output features (`dim` 0) or input features (`dim` 1) of a linear layer, and free the others.

    Raises:
        LightPeftError: the layer is no linear layer that can be cut.
    """
    _kind(layer).keep(layer, index.to(layer.weight.device), dim)


def _kind(layer: nn.Module) -> LinearKind:
    for kind in LINEAR_KINDS:
        if kind.matches(layer):
            return kind
    raise LightPeftError(
        f"a layer of type {describe(layer)} cannot be pruned; docs/how-to/low_memory.md lists the types that can"
    )


def _name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__name__}"
