"""Activations that the backward pass makes again, instead of keeping them from the forward pass.

A feed-forward network with a gate keeps four tensors of its full width a block: what enters the activation, what leaves
it, what it is multiplied with, and the product. Two of them are one cheap pass away from the others, as masked ones are
in estimation, and as a norm's output in half precision is from what enters the norm. No product of matrices is computed
twice, unlike under gradient checkpointing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.autograd.graph import saved_tensors_hooks

from lightpeft.compat.torch import maker_of
from lightpeft.compat.transformers import recomputes
from lightpeft.models.patching import override_forward
from lightpeft.models.unwrap import transformers_model


@contextmanager
def recomputed_activations(model: nn.Module) -> Iterator[None]:
    """Inside the block, the graphs that the model builds keep no activation that what they keep anyway makes again.

    Gradients are the same to the last bit. Not under gradient checkpointing, which keeps next to nothing by itself.

    Args:
        model: a transformers model, or a PeftModel around one.
    """
    inner = transformers_model(model)
    usual = inner.forward

    @functools.wraps(usual)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not is_grad_enabled() or recomputes(inner):
            return usual(*args, **kwargs)
        with saved_tensors_hooks(_keep, _Kept()):
            return usual(*args, **kwargs)

    with override_forward(inner, forward):
        yield


def _keep(tensor: Tensor) -> Tensor | partial[Tensor]:
    """The tensor, or what makes it again."""
    return maker_of(tensor) or tensor


class _Kept:
    """What was kept, or made again; what queries, keys and values read is made once for all three.

    One of these is as old as the graph of a forward pass, and goes with it.
    """

    def __init__(self) -> None:
        self._last: tuple[Any, Tensor] | None = None

    def __call__(self, kept: Tensor | partial[Tensor]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        way = (kept.func, kept.args)
        if self._last is None or self._last[0] != way:
            self._last = None  # so that it is not in memory beside the next
            self._last = way, kept()
        return self._last[1]
