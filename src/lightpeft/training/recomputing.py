"""Activations that the backward pass recomputes instead of storing them in the forward pass.

A gated feed-forward network stores four tensors of its full width per block: input and output of the activation
function, the other factor, and the product. Two of them are cheap to recompute from the others, as are masked
activations in estimation, and a norm's output in half precision. Unlike gradient checkpointing, this repeats no matrix
product.
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
    """Do not store activations inside the block that can be recomputed from other stored tensors.

    Gradients are bitwise the same. It does not apply under gradient checkpointing, which stores little by itself.

    Args:
        model: a transformers model, or a PeftModel around one.
    """
    inner = transformers_model(model)
    usual = inner.forward

    @functools.wraps(usual)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not is_grad_enabled() or recomputes(inner):
            return usual(*args, **kwargs)
        with saved_tensors_hooks(_pack, _Unpack()):
            return usual(*args, **kwargs)

    with override_forward(inner, forward):
        yield


def _pack(tensor: Tensor) -> Tensor | partial[Tensor]:
    """Pack hook of autograd: return a function that recomputes the tensor, or the tensor if there is none."""
    return maker_of(tensor) or tensor


class _Unpack:
    """Unpack hook of autograd: return a stored tensor, or recompute it.

    The last recomputed tensor is cached, because queries, keys and values read the same one. Each forward pass has its
    own hook, which lives as long as the graph.
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
