"""LoRA layers as a single node of the autograd graph, with the same results and fewer passes over memory.

PEFT computes a LoRA layer as a frozen projection, two small ones, a scaling and a sum; autograd then saves and adds the
intermediate tensors. With few ranks on small (pruned) projections this costs more than the products themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightpeft.compat.peft import LoraLinear
from lightpeft.compat.stand_ins import StandIn
from lightpeft.compat.torch import changes_of, is_watched
from lightpeft.machine import compute_dtype
from lightpeft.models.linears.on_disk import LinearOnDisk, is_on_disk
from lightpeft.models.patching import override_forward


@contextmanager
def fused_lora(model: nn.Module) -> Iterator[None]:
    """Fuse LoRA on frozen `nn.Linear` layers, in memory or on disk, inside the block: `W x + b + s B A x` in one node.

    Outputs and gradients equal those of PEFT up to the order of rounding. PEFT computes all other layers, decided at
    each call: DoRA and other variants, trained biases, quantized layers, several, merged or disabled adapters, hooks on
    the parts, and weights of another data type than the computation.

    Args:
        model: a PeftModel, or a model that contains one.
    """
    casts = _Casts()
    with ExitStack() as stack:
        for layer in model.modules():
            if type(layer) is LoraLinear:
                stack.enter_context(override_forward(layer, _Fused(layer, layer.forward, casts)))
        stack.callback(casts.forget)
        yield


class _Casts:
    """Cache of the last converted input, because queries, keys and values read the same one.

    The input is converted once, and saved once for their backward passes.
    """

    def __init__(self) -> None:
        self._given: Tensor | None = None
        self._cast: Tensor | None = None
        self._state: tuple[Any, ...] = ()

    def of(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `x.to(dtype)`, from the cache if `x` is the last input."""
        if x.dtype == dtype:
            return x
        state = (dtype, changes_of(x), torch.is_grad_enabled())
        if self._cast is None or self._given is not x or self._state != state:
            self._given, self._cast, self._state = x, x.to(dtype), state
        return self._cast

    def forget(self) -> None:
        """Drop the cached tensors."""
        self._given = self._cast = None


class _Fused:
    """Fused forward of one LoRA layer for training."""

    def __init__(self, layer: LoraLinear, otherwise: Callable[..., Any], casts: _Casts) -> None:
        """
        Args:
            otherwise: forward of the layer itself.
            casts: cache of inputs, shared by all layers.
        """
        self.layer, self.otherwise, self.casts = layer, otherwise, casts

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        adapter = None if args or kwargs else plain_adapter(layer)
        if adapter is None:
            return self.otherwise(x, *args, **kwargs)
        base, down, up = layer.base_layer, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        dtype = compute_dtype(x, base.weight, down, up)
        if dtype is None:
            return self.otherwise(x)
        dropout = layer.lora_dropout[adapter]
        dropped = dropout(x).to(dtype) if layer.training and not isinstance(dropout, nn.Identity) else None
        weight = base if isinstance(base, LinearOnDisk) else base.weight
        return _LoraLinear.apply(self.casts.of(x, dtype), dropped, weight, base.bias, down, up, layer.scaling[adapter])


def plain_adapter(layer: LoraLinear) -> str | None:
    """Return the adapter of a layer that computes plain LoRA with one adapter; None: it computes something else."""
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(adapters) != 1 or layer.disable_adapters or layer.merged or adapters[0] in layer.lora_variant:
        return None
    base, down, up = layer.base_layer, layer.lora_A[adapters[0]], layer.lora_B[adapters[0]]
    frozen = not any(parameter.requires_grad for parameter in base.parameters())
    linear = type(base) in (nn.Linear, LinearOnDisk) and type(down) is type(up) is nn.Linear
    plain = linear and all(_is_plain(part) for part in (base, down, up))
    return adapters[0] if frozen and plain and down.bias is None and up.bias is None else None


def _is_plain(linear: nn.Linear) -> bool:
    """Return whether a layer has no hooks, no replaced forward, and an ordinary weight, in memory or on disk."""
    changed = is_watched(linear) or "forward" in vars(linear)
    return not changed and (type(linear.weight) in (nn.Parameter, StandIn) or is_on_disk(linear))


class _LoraLinear(torch.autograd.Function):
    """Compute `x W' + b + s (low A') B'` on rows; `low` is x, or x after dropout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor | LinearOnDisk,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
    ) -> Tensor:
        """
        Args:
            x: input, [..., in], in the data type of the computation.
            dropped: x after dropout, or None.
            weight, bias: those of the frozen layer, [out, in] and [out], of any data type. The weight itself is saved
                for the backward pass and converted again there, which takes little time; converted copies of all
                layers would take half of the model's memory again. A weight on disk is not saved.
            down, up: A [rank, in] and B [out, rank], of any data type.
            scaling: factor s.
        """
        entering = x if dropped is None else dropped
        low = entering.flatten(0, -2)
        converted = _read_weight(weight).to(x.dtype)
        down, scaled_up = down.to(x.dtype), (up * scaling).to(x.dtype)
        inner = low @ down.T  # [rows, rank]
        rows = x.flatten(0, -2)
        result = rows @ converted.T if bias is None else torch.addmm(bias.to(x.dtype), rows, converted.T)
        result.addmm_(inner, scaled_up.T)
        kept, ctx.on_disk = (weight, None) if isinstance(weight, Tensor) else (None, weight)
        ctx.save_for_backward(entering, inner, kept, down, scaled_up)
        ctx.scaling, ctx.shape, ctx.dropout = scaling, x.shape, dropped is not None
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        entering, inner, weight, down, scaled_up = ctx.saved_tensors
        low, gradient = entering.flatten(0, -2), gradient.flatten(0, -2)
        of_inner = gradient @ scaled_up
        of_down, of_up = of_inner.T @ low, (gradient.T @ inner) * ctx.scaling
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ _read_weight(ctx.on_disk if weight is None else weight).to(gradient.dtype)
        of_dropped = None
        if ctx.dropout:
            of_dropped = (of_inner @ down).view(ctx.shape) if ctx.needs_input_grad[1] else None
        elif of_x is not None:
            of_x.addmm_(of_inner, down)
        of_x = None if of_x is None else of_x.view(ctx.shape)
        return of_x, of_dropped, None, None, of_down, of_up, None


def _read_weight(weight: Tensor | LinearOnDisk) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.read()
