"""accelerate: what it keeps of a training that it has prepared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def forget_optimizers(accelerator: Any) -> None:
    """Let accelerate know of no optimizer: under float16 it would unscale the gradients of parameters that are gone."""
    accelerator._optimizers.clear()


@contextmanager
def as_it_is(model: nn.Module) -> Iterator[None]:
    """Inside the block a model computes in the precision of its weights, without the autocast of its training."""
    prepared = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if prepared is not None:
            vars(model)["forward"] = prepared
