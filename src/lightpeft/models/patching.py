"""What is changed in a live model for a while, and is as before afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def override_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block, the module computes `forward`; its attributes, state and structure stay as they are."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        vars(module).pop("forward")
        if before is not None:
            vars(module)["forward"] = before


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Inside the block, the model is in train or eval mode; afterwards every module is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, own in modes:
            module.training = own
