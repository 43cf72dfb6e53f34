"""LoRA beside the weights of a model that only answers: as few and as large steps as there can be.

One row, or one token, at a time is where these steps are most of the work: PEFT takes five operations for a layer
beside its own checks, and a pruned model has LoRA on all kinds of projections.
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
from lightpeft.machine import computed_in
from lightpeft.models.patching import override_forward
from lightpeft.peft_kinds.sites.fused import plain_adapter

_SEEN = "_lightpeft_inner"
"""Attribute of an input: what A gives for it, of all layers that may read it. So it is the input's and its thread's."""


@contextmanager
def fused_answers(model: nn.Module) -> Iterator[None]:
    """Inside the block, a model that answers computes LoRA on frozen `nn.Linear` layers in two or three operations, and
    what queries, keys and values (gate and input) multiply by A in one for all of them.

    That holds in evaluation mode where no gradients are asked for; the model gives what PEFT gives but for the order of
    rounding. Inside the block weights must stay as they are, and no hook may be put on a layer's parts. What has
    something more to it is left to PEFT: DoRA and other variants, trained biases, quantised layers and those on disk,
    several, merged or disabled adapters, hooks, and weights of another data type than the computation. Any thread may
    ask the model.

    Args:
        model: a PeftModel, or a model that holds one.
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
    """Layers side by side that may read one input: with inputs of one size, and A of one type in one place."""
    alike: dict[Any, list[LoraLinear]] = defaultdict(list)
    for layer in layers:
        adapter = plain_adapter(layer)
        if adapter is not None and type(layer.base_layer) is nn.Linear:
            down = layer.lora_A[adapter].weight
            alike[adapter, down.shape[1], down.dtype, down.device].append(layer)
    return list(alike.values())


class _Inner:
    """`A x` of layers that may read one input, computed when the first of them does, and kept with that input."""

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        downs = [layer.lora_A[layer.active_adapters[0]].weight for layer in layers]
        self.places = list(pairwise(accumulate(map(len, downs), initial=0)))
        self.down = torch.cat([down.detach() for down in downs]).T  # [in, ranks of all]

    def of(self, x: Tensor, dtype: torch.dtype, place: int) -> tuple[Tensor, Tensor]:
        """The input as rows in the data type of the computation, [rows, in], and `A x` of one layer, [rows, rank].

        Args:
            x: what the layer was given, which all of them may be.
        """
        if len(self.places) == 1:
            rows = x.to(dtype).flatten(0, -2)
            return rows, rows @ self.down.to(dtype)
        state = (self, dtype, change_count(x))
        known = getattr(x, _SEEN, None)
        if known is None or known[0] != state:
            rows = x.to(dtype)
            inner = rows.flatten(0, -2) @ self.down.to(dtype)
            known = state, None if rows is x else rows, inner  # an input that held itself would never go
            setattr(x, _SEEN, known)
        first, last = self.places[place]
        _, converted, inner = known
        return (x if converted is None else converted).flatten(0, -2), inner[:, first:last]


class _Answer:
    """The forward of one LoRA layer."""

    def __init__(self, layer: LoraLinear, inner: _Inner, place: int) -> None:
        """
        Args:
            inner: of all layers that may read its input.
            place: of this one among them.
        """
        self.layer, self.inner, self.place = layer, inner, place
        self.otherwise: Callable[..., Any] = layer.forward
        (self.adapter,) = layer.active_adapters
        base, up = layer.base_layer, layer.lora_B[self.adapter].weight.detach()
        self.weight, self.bias, self.up = base.weight, base.bias, up.T  # [rank, out]
        self.scaling = layer.scaling[self.adapter]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        left = args or kwargs or torch.is_grad_enabled() or self._changed()
        dtype = None if left else computed_in(x, self.weight, self.inner.down, self.up)
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

    def _changed(self) -> bool:
        """Whether the layer trains, or computes with another adapter, or with none."""
        layer = self.layer
        other = layer.training or layer.disable_adapters or layer.merged_adapters
        return bool(other) or layer.active_adapters != [self.adapter]
