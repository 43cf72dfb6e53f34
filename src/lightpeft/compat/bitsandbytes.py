"""bitsandbytes: codes and scales of its layers, and errors of its kernels. This module does not import it."""

from __future__ import annotations

import copy
import functools
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn


def has_type(thing: object, name: str) -> bool:
    """Return True if an object is an instance of `bitsandbytes.nn.<name>`; False if bitsandbytes is not imported."""
    library: Any = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(thing, getattr(library.nn, name))


def class_of_layers(name: str) -> type[Any]:
    """Return the class `name` of `bitsandbytes.nn`, which must be imported already."""
    library: Any = sys.modules["bitsandbytes"]
    return getattr(library.nn, name)


def quant_state(weight: Any) -> Any:
    """Return the `QuantState` of a weight that is quantized in 4 bits; None for any other weight."""
    return weight.quant_state if has_type(weight, "Params4bit") else None


def unquantized_dtype(state: Any) -> torch.dtype:
    """Return the data type of a 4-bit weight before it was quantized."""
    return state.original_dtype if _packed_for_cpu(state) else state.dtype


def codes(weight: Any) -> tuple[Tensor, Tensor]:
    """Return the codes and scales of a 4-bit weight, also if its scales are quantized or its layout is for AVX512-BF16.

    Returns:
        Codes, two per byte with the first in the high bits, [ceil(numel / 2)], uint8; scales, [blocks], float32.
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


def dequantized(packed: Tensor, scales: Tensor, state: Any) -> Tensor:
    """Dequantize a 4-bit weight, one block per row: in this shape bitsandbytes' kernels are correct for all widths.

    Args:
        packed: codes, two per byte, [ceil(numel / 2)].
        scales: [blocks], float32.
        state: `QuantState` of the weight.

    Returns:
        Values, [numel], float32.
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


def quantized_like(old: Any, dense: Tensor, layer: Any) -> Any:
    """Quantize a dense weight, [out, in], in 4 bits with the settings of `old`, for the same layer."""
    new = type(old)(
        dense,
        requires_grad=False,
        blocksize=old.quant_state.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        module=layer,
    ).to(dense.device)  # this quantizes
    new.quant_state.dtype = unquantized_dtype(old.quant_state)
    return new


def keep_layout(layer: Any) -> None:
    """Keep a 4-bit layer's weight in the layout that it was loaded in.

    On CPUs with AVX512-BF16, bitsandbytes would repack it at the first forward pass in eval mode, which permanently
    rounds the scales to bfloat16, and fails unless rows are a multiple of 32 and columns are whole blocks.
    """
    layer.support_avx512bf16_for_cpu = False


@functools.cache
def cpu_kernel_is_right(width: int, blocksize: int) -> bool:
    """Return True if bitsandbytes dequantizes rows of `width` weights with the right scales on this CPU.

    Its AVX512 kernel (0.50) uses the scales of other blocks if rows are multiples of 16 but no whole blocks.
    """
    functional = _functional()
    if width % blocksize == 0:
        return True
    rows = torch.arange(1.0, blocksize * width + 1).view(blocksize, width)  # many blocks, however narrow they are
    packed, state = functional.quantize_4bit(rows, blocksize=blocksize, quant_type="nf4")
    expected = dequantized(packed.flatten(), state.absmax, state).view_as(rows)
    return torch.allclose(functional.dequantize_4bit(packed, state), expected)


def row_scales(layer: Any) -> Any:
    """Return the scales of an 8-bit layer, [out]: the weight has them until the first forward pass, then the state."""
    return layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB


def set_row_quantized(layer: Any, integers: Tensor, scales: Tensor) -> None:
    """Set the integers [out, in] and scales [out] of an 8-bit layer, which is then as if it had never run."""
    # the first forward pass moves them into the state
    layer.weight = type(layer.weight)(integers, requires_grad=False, CB=integers, SCB=scales)
    layer.state.reset_grads()


def _packed_for_cpu(state: Any) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _functional() -> Any:
    library: Any = sys.modules["bitsandbytes"]
    return library.functional
