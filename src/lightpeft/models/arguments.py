"""Changes to arguments of a module's forward by name, whether they are passed by position or by keyword."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

Change = Callable[[Any], Any]
"""Function from the argument that a module is called with to its replacement."""


def change_arguments(module: nn.Module, changes: Mapping[str, Change]) -> RemovableHandle:
    """Hook functions that replace arguments onto a module, by argument name; an argument that is None stays None."""
    return module.register_forward_pre_hook(_ReplaceArguments(_positions(module), changes), with_kwargs=True)


def _positions(module: nn.Module) -> dict[str, int]:
    """Return argument -> its position, for arguments that may be passed by position."""
    by_position = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return {p.name: place for place, p in enumerate(_parameters(module)) if p.kind in by_position}


def _parameters(module: nn.Module) -> list[Parameter]:
    return list(inspect.signature(module.forward).parameters.values())


class _ReplaceArguments:
    """Forward pre-hook that replaces some arguments."""

    def __init__(self, positions: Mapping[str, int], changes: Mapping[str, Change]) -> None:
        self.by_name = dict(changes)
        self.by_position = {positions[name]: change for name, change in changes.items() if name in positions}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = tuple(_replace(value, self.by_position.get(place)) for place, value in enumerate(args))
        return changed, {name: _replace(value, self.by_name.get(name)) for name, value in kwargs.items()}


def _replace(value: Any, change: Change | None) -> Any:
    return value if value is None or change is None else change(value)
