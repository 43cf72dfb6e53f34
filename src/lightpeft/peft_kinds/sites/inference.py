"""Fast inference of LoRA on frozen layers, with few and large operations.

Operations dominate the time for single rows or tokens: PEFT needs five for each layer beside its own checks, and a
pruned model has LoRA on all kinds of projections.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightpeft.compat.peft import LoraLinear
from lightpeft.compat.torch import change_count
from lightpeft.machine import compute_dtype
from lightpeft.models.patching import override_forward
from lightpeft.peft_kinds.sites.fused import plain_adapter

_SEEN = "_lightpeft_inner"
"""Attribute of an input tensor that holds its products with A of all layers that may read it, local to a thread."""


@contextmanager
def fused_inference(model: nn.Module) -> Iterator[None]:
    """Speed up inference inside the block: LoRA on frozen `nn.Linear` layers takes two or three operations per layer.

    Queries, keys and values (gate and input) share one product with A. This holds in evaluation mode without gradients;
    results equal those of PEFT up to the order of rounding. Inside the block weights must not change, and no hook may
    be added to a layer's parts. PEFT computes all other layers: DoRA and other variants, trained biases, quantized
    layers and layers on disk, several, merged or disabled adapters, hooks, and weights of another data type than the
    computation. The model may be called from any thread.

    Example:
        model = load_light("adapter").eval()
        with torch.inference_mode(), fused_inference(model):
            logits = model(**batch).logits

    Args:
        model: a PeftModel, or a model that contains one.
    """
    with ExitStack() as stack:
        for parent in model.modules():
            layers = [layer for layer in parent.children() if type(layer) is LoraLinear]
            for group in _groups(layers):
                inner = _Inner(group)
                for place, layer in enumerate(group):
                    stack.enter_context(override_forward(layer, _Answer(layer, inner, place)))
        yield


def _groups(layers: Sequence[LoraLinear]) -> list[list[LoraLinear]]:
    """Group layers of one parent that may read the same input: equal input size, and A of one type on one device."""
    alike: dict[Any, list[LoraLinear]] = defaultdict(list)
    for layer in layers:
        adapter = plain_adapter(layer)
        if adapter is not None and type(layer.base_layer) is nn.Linear:
            down = layer.lora_A[adapter].weight
            alike[adapter, down.shape[1], down.dtype, down.device].append(layer)
    return list(alike.values())


class _Inner:
    """Cache of `A x` of layers that may read one input; the first layer computes it, and the input tensor holds it."""

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        downs = [layer.lora_A[layer.active_adapters[0]].weight for layer in layers]
        self.places = list(pairwise(accumulate(map(len, downs), initial=0)))
        self.down = torch.cat([down.detach() for down in downs]).T  # [in, ranks of all]

    def of(self, x: Tensor, dtype: torch.dtype, place: int) -> tuple[Tensor, Tensor]:
        """Return the input as rows in the data type of the computation, [rows, in], and a layer's `A x`, [rows, rank].

        Args:
            x: input of the layer, which other layers of the group may share.
            place: position of the layer in its group.
        """
        if len(self.places) == 1:
            rows = x.to(dtype).flatten(0, -2)
            return rows, rows @ self.down.to(dtype)
        state = (self, dtype, change_count(x))
        known = getattr(x, _SEEN, None)
        if known is None or known[0] != state:
            rows = x.to(dtype)
            inner = rows.flatten(0, -2) @ self.down.to(dtype)
            known = state, None if rows is x else rows, inner  # an input that held itself would never be freed
            setattr(x, _SEEN, known)
        first, last = self.places[place]
        _, converted, inner = known
        return (x if converted is None else converted).flatten(0, -2), inner[:, first:last]


class _Answer:
    """Fast forward of one LoRA layer for inference."""

    def __init__(self, layer: LoraLinear, inner: _Inner, place: int) -> None:
        """
        Args:
            inner: cache of all layers that may read its input.
            place: position of this layer in the cache.
        """
        self.layer, self.inner, self.place = layer, inner, place
        self.otherwise: Callable[..., Any] = layer.forward
        (self.adapter,) = layer.active_adapters
        base, up = layer.base_layer, layer.lora_B[self.adapter].weight.detach()
        self.weight, self.bias, self.up = base.weight, base.bias, up.T  # [rank, out]
        self.scaling = layer.scaling[self.adapter]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        left = args or kwargs or torch.is_grad_enabled() or self._has_changed()
        dtype = None if left else compute_dtype(x, self.weight, self.inner.down, self.up)
        if dtype is None:
            return self.otherwise(x, *args, **kwargs)
        rows, inner = self.inner.of(x, dtype, self.place)
        weight, up = self.weight.to(dtype).T, self.up.to(dtype)
        result = rows @ weight if self.bias is None else torch.addmm(self.bias.to(dtype), rows, weight)
        if len(up) == 1:  # one pass over the result takes less time than a product of two vectors does in oneDNN
            result.addcmul_(inner, up, value=self.scaling)
        else:
            result.addmm_(inner, up, alpha=self.scaling)
        return result.view(*x.shape[:-1], -1)

    def _has_changed(self) -> bool:
        """Return whether the layer is in training mode, or its adapters differ from those at the start."""
        layer = self.layer
        other = layer.training or layer.disable_adapters or layer.merged_adapters
        return bool(other) or layer.active_adapters != [self.adapter]
