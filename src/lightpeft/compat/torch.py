"""PyTorch: the tables that a module keeps its parameters and hooks in, and how often a tensor was changed."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def changes_of(tensor: Tensor) -> int | None:
    """How often a tensor has been changed in place; None of one that does not count, because no graph can hold it."""
    return None if tensor.is_inference() else tensor._version


def is_watched(module: nn.Module) -> bool:
    """Whether hooks see, or may change, what the module computes."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def with_own_parameters(module: nn.Module) -> nn.Module:
    """A copy of the module that holds the same parameters, until its own are set; all else is shared."""
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = dict(module._parameters)
    return twin


def is_convolution(module: nn.Module) -> bool:
    """Whether the module is a convolution, transposed ones among them, over whatever number of dimensions."""
    return isinstance(module, nn.modules.conv._ConvNd)


def set_unseen(module: nn.Module, name: str, parameter: Any) -> None:
    """Set a parameter that the module has already; hooks on the registration of parameters are not called."""
    module._parameters[name] = parameter
