"""Finding the kind of a linear layer, and asking it."""

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
    OnDiskLinear(),  # before the plain ones, which it is of as well
    PlainLinear(),
    TransposedLinear(),
    FourBitLinear(),
    EightBitLinear(),
)
"""The kinds of linear layers that can be cut, the first that matches counts."""


def is_linear(layer: nn.Module) -> bool:
    """Whether the layer is a linear layer that can be cut."""
    return any(kind.matches(layer) for kind in LINEAR_KINDS)


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


def describe(layer: nn.Module) -> str:
    """A layer's type for messages, with that of its weight where that is a type of its own."""
    weight = getattr(layer, "weight", None)
    own = "" if weight is None or type(weight) in (nn.Parameter, Tensor) else f" with a {_name(weight)} weight"
    return f"{_name(layer)}{own}"


@torch.no_grad()
def slice_linear(layer: Any, index: Tensor, dim: int) -> None:
    """Keep output features (`dim` 0) or input features (`dim` 1) of a linear layer; the rest is freed.

    Raises:
        LightPeftError: not a linear layer that can be cut.
    """
    _kind(layer).keep(layer, index.to(layer.weight.device), dim)


def _kind(layer: nn.Module) -> LinearKind:
    for kind in LINEAR_KINDS:
        if kind.matches(layer):
            return kind
    raise LightPeftError(f"a {describe(layer)} cannot be pruned")


def _name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__name__}"
