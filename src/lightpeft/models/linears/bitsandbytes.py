"""Linear layers quantized by bitsandbytes, in 4 or 8 bits."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from lightpeft.compat.bitsandbytes import (
    class_of_layers,
    codes,
    cpu_kernel_is_right,
    dequantized,
    has_type,
    keep_layout,
    quant_state,
    quantized_like,
    row_scales,
    set_row_quantized,
)
from lightpeft.models.linears.kinds import QuantizedKind


class FourBitLinear(QuantizedKind):
    """`Linear4bit` (QLoRA, Dettmers et al. 2023): NF4 or FP4 codes with one scale for each block of 64 weights.

    Blocks run along the rows, one row after the other. If rows are whole blocks, cutting rows keeps codes and scales,
    and so does cutting columns by whole blocks (heads, if the head dimension is a multiple of the block size). Cutting
    single columns forms new blocks. Under double quantization the scales are always quantized again.
    """

    def matches(self, layer: Any) -> bool:
        return has_type(layer, "Linear4bit") and quant_state(layer.weight) is not None

    def dense_weight(self, layer: Any) -> Tensor:
        return _dequantize(layer.weight)

    def stored_weight(self, layer: Any) -> Tensor:
        shape = quant_state(layer.weight).shape
        packed, _ = codes(layer.weight)
        return torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[: math.prod(shape)].view(shape)

    def _cut_weight(self, layer: Any, index: Tensor, dim: int) -> None:
        layer.weight = quantized_like(layer.weight, self.dense_weight(layer).index_select(dim, index), layer)
        _fit_for_cpu(layer)


class EightBitLinear(QuantizedKind):
    """`Linear8bitLt` (LLM.int8(), Dettmers et al. 2022): one scale for each row, so all cuts are exact."""

    def matches(self, layer: Any) -> bool:
        quantized = has_type(layer, "Linear8bitLt") and layer.weight.dtype == torch.int8
        return quantized and row_scales(layer) is not None

    def dense_weight(self, layer: Any) -> Tensor:
        return layer.weight.data.float() * (row_scales(layer).unsqueeze(1) / 127)

    def stored_weight(self, layer: Any) -> Tensor:
        return layer.weight.data

    def _cut_weight(self, layer: Any, index: Tensor, dim: int) -> None:
        scales = row_scales(layer)
        scales = scales.index_select(0, index) if dim == 0 else scales
        set_row_quantized(layer, layer.weight.data.index_select(dim, index), scales)


def prepare_quantized(model: nn.Module) -> None:
    """Prepare a newly loaded model with bitsandbytes layers for training and pruning; other models do not change.

    Layers without weights in the checkpoint (a task head) have bitsandbytes' types, but are not quantized; they become
    ordinary layers. 4-bit layers are replaced where bitsandbytes' kernel for CPUs is wrong.
    """
    four_bits = FourBitLinear()
    for name, module in list(model.named_modules()):
        if _is_unquantized(module):
            model.set_submodule(name, _to_linear(module))
        elif four_bits.matches(module):
            _fit_for_cpu(module)


def logical_numel(parameter: Tensor) -> int:
    """Return the number of weights of a parameter; one element of a packed 4-bit parameter holds several."""
    state = quant_state(parameter)
    return parameter.numel() if state is None else math.prod(state.shape)


def _is_unquantized(layer: Any) -> bool:
    of_theirs = has_type(layer, "Linear4bit") or has_type(layer, "Linear8bitLt")
    return of_theirs and type(layer.weight) is nn.Parameter and layer.weight.is_floating_point()


def _to_linear(layer: Any) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight, linear.bias = layer.weight, layer.bias
    return linear.train(layer.training)


def _fit_for_cpu(layer: Any) -> None:
    """Make a 4-bit layer of any width compute correctly on CPUs."""
    keep_layout(layer)
    state = quant_state(layer.weight)
    if not cpu_kernel_is_right(state.shape[1], state.blocksize):
        layer.__class__ = _block_wise_class()


def _dequantize(weight: Any) -> Tensor:
    """Dequantize a 4-bit weight to float32, [out, in]."""
    state = quant_state(weight)
    return dequantized(*codes(weight), state).view(state.shape)


@functools.cache
def _block_wise_class() -> type[Any]:
    """Make the subclass of bitsandbytes' `Linear4bit` for rows that its kernel for CPUs computes incorrectly."""
    linear: Any = class_of_layers("Linear4bit")

    class BlockWiseLinear4bit(linear):
        """Layer that dequantizes block by block instead of row by row, for which the same kernel is correct."""

        def forward(self, x: Tensor) -> Tensor:
            """Apply the layer: [..., in] -> [..., out]."""
            if x.device.type != "cpu":
                return super().forward(x)
            result = _BlockWise.apply(x.to(self.compute_dtype or x.dtype), self.weight)
            return (result if self.bias is None else result + self.bias.to(result.dtype)).to(x.dtype)

    return BlockWiseLinear4bit


class _BlockWise(torch.autograd.Function):
    """Compute `x @ weight.T`; the backward pass dequantizes again, so that no dense weight is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return x @ _dequantize(weight).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ _dequantize(ctx.weight).to(gradient.dtype), None
