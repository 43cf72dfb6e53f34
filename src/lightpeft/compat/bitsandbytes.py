"""bitsandbytes: where its layers keep codes and scales, and which of its kernels are right. It is not imported here."""

from __future__ import annotations

import copy
import functools
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn


def has_type(thing: object, name: str) -> bool:
    """Whether it is of the class `name` of `bitsandbytes.nn`, which only exists where somebody imported that."""
    library: Any = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(thing, getattr(library.nn, name))


def class_of_layers(name: str) -> type[Any]:
    """The class `name` of `bitsandbytes.nn`, of which there is a layer."""
    library: Any = sys.modules["bitsandbytes"]
    return getattr(library.nn, name)


def quant_state(weight: Any) -> Any:
    """bitsandbytes' `QuantState` of a weight quantised in 4 bits; None for any other."""
    return weight.quant_state if has_type(weight, "Params4bit") else None


def unquantised_dtype(state: Any) -> torch.dtype:
    """What a 4-bit weight was before it was quantised."""
    return state.original_dtype if _packed_for_cpu(state) else state.dtype


def codes(weight: Any) -> tuple[Tensor, Tensor]:
    """Of a 4-bit weight two codes a byte, [ceil(numel / 2)], the first in the high bits; and scales [blocks], float32.

    Also of one in the layout that CPUs with AVX512-BF16 compute in, and of scales that are quantised themselves.
    """
    functional = _functional()
    state, packed = copy.copy(weight.quant_state), weight.data
    if _packed_for_cpu(state):
        state.original_nested = False  # leaves the scales as they are
        packed, state = functional._convert_weight_packed_for_cpu_inverse(packed, state)
        scales = state.absmax.T.reshape(-1)
    elif state.nested:
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    else:
        scales = state.absmax
    return packed.contiguous().view(torch.uint8).flatten(), scales.float()


def dequantised(packed: Tensor, scales: Tensor, state: Any) -> Tensor:
    """[numel] in float32, with one block a row: in this shape bitsandbytes' kernels are right for all widths.

    Args:
        packed, scales: as `codes` gives them.
        state: of the weight whose they are.
    """
    functional = _functional()
    size = state.blocksize
    packed = nn.functional.pad(packed, (0, len(scales) * size // 2 - len(packed)))
    blocks = functional.QuantState(
        absmax=scales,
        shape=torch.Size((len(scales), size)),
        code=state.code,
        blocksize=size,
        quant_type=state.quant_type,
        dtype=torch.float32,
    )
    return functional.dequantize_4bit(packed.unsqueeze(1), blocks).flatten()[: math.prod(state.shape)]


def quantised_like(old: Any, dense: Tensor, layer: Any) -> Any:
    """A weight [out, in] quantised in 4 bits as `old` was, for the same layer."""
    new = type(old)(
        dense,
        requires_grad=False,
        blocksize=old.quant_state.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        module=layer,
    ).to(dense.device)  # this quantises
    new.quant_state.dtype = unquantised_dtype(old.quant_state)
    return new


def keep_layout(layer: Any) -> None:
    """Let a 4-bit layer's weight stay in the layout it was loaded in.

    On CPUs with AVX512-BF16 bitsandbytes else packs it anew at the first forward pass in eval mode, which rounds the
    scales to bfloat16 for good and fails on widths other than multiples of 32 rows and of whole blocks.
    """
    layer.support_avx512bf16_for_cpu = False


@functools.cache
def cpu_kernel_is_right(width: int, blocksize: int) -> bool:
    """Whether bitsandbytes dequantises rows of `width` weights with the right scales on this CPU.

    Its AVX512 kernel (0.50) takes the scales of other blocks where rows are no whole blocks but multiples of 16.
    """
    functional = _functional()
    if width % blocksize == 0:
        return True
    rows = torch.arange(1.0, blocksize * width + 1).view(blocksize, width)  # many blocks, however narrow they are
    packed, state = functional.quantize_4bit(rows, blocksize=blocksize, quant_type="nf4")
    expected = dequantised(packed.flatten(), state.absmax, state).view_as(rows)
    return torch.allclose(functional.dequantize_4bit(packed, state), expected)


def row_scales(layer: Any) -> Any:
    """[out] of an 8-bit layer: with the weight until the first forward pass, in the layer's state afterwards."""
    return layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB


def set_row_quantised(layer: Any, integers: Tensor, scales: Tensor) -> None:
    """Give an 8-bit layer other integers [out, in], with their scales [out]; as after loading, it has not run yet."""
    # the first forward pass moves them into the state
    layer.weight = type(layer.weight)(integers, requires_grad=False, CB=integers, SCB=scales)
    layer.state.reset_grads()


def _packed_for_cpu(state: Any) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _functional() -> Any:
    library: Any = sys.modules["bitsandbytes"]
    return library.functional
