"""Linear layers in 4 or 8 bits (bitsandbytes, torchao): how their weights are read and cut.

Where a format keeps one scale a row, or a cut takes whole blocks with their scales, what stays is what was there, to
the bit. Elsewhere blocks with scales of their own are formed anew (dequantise, cut, quantise), which rounds once more.
Neither package is needed, nor imported here: a layer of theirs can only exist in a process that has imported it.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class QuantisedLinear(ABC):
    """How one kind of quantised linear layer is read and cut."""

    @abstractmethod
    def matches(self, layer: Any) -> bool:
        """Whether `layer` is of this kind."""

    @abstractmethod
    def dense_weight(self, layer: Any) -> Tensor:
        """The weight that the layer computes with, [out, in], dequantised to float32."""

    @abstractmethod
    def stored_weight(self, layer: Any) -> Tensor:
        """The integers that the weight is kept as, [out, in]; they stay as they are while the model runs."""

    def features(self, layer: Any) -> tuple[int, int]:
        """Output and input features, without dequantising anything."""
        return layer.out_features, layer.in_features

    def fault(self, layer: Any, width: int, dim: int) -> str | None:
        """Why the layer cannot be cut to `width` output (`dim` 0) or input features (`dim` 1); None: it can."""
        return None

    def keep(self, layer: Any, index: Tensor, dim: int) -> None:
        """Keep output features (`dim` 0) or input features (`dim` 1), in place."""
        if len(index):
            self._cut_weight(layer, index, dim)
        else:
            _empty(layer, dim)
        if dim == 0:
            layer.out_features = len(index)
            if layer.bias is not None:
                bias = layer.bias.detach().index_select(0, index)
                layer.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
        else:
            layer.in_features = len(index)

    @abstractmethod
    def _cut_weight(self, layer: Any, index: Tensor, dim: int) -> None:
        """Replace the weight by its rows or columns `index`, of which there is at least one."""


class EmptyLinear(nn.Linear):
    """What is left of a quantised layer without input or without output features: nothing to quantise, and the bias."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        result = x.new_zeros(*x.shape[:-1], self.out_features)
        return result if self.bias is None else result + self.bias.to(x.dtype)


def _empty(layer: Any, dim: int) -> None:
    rows, columns = (0, layer.in_features) if dim == 0 else (layer.out_features, 0)
    weight = torch.empty(rows, columns, device=layer.weight.device)
    layer.__class__ = EmptyLinear
    layer.weight = nn.Parameter(weight, requires_grad=False)


# bitsandbytes


class FourBitLinear(QuantisedLinear):
    """bitsandbytes' `Linear4bit` (QLoRA, Dettmers et al. 2023): NF4 or FP4 codes with one scale a block of 64 weights.

    Blocks run along the rows, one row after the other. Rows that are whole blocks keep their codes and scales when rows
    go, and so do columns that go by whole blocks (heads, where the head dimension is a multiple of the block size).
    Cutting single columns forms new blocks. Under double quantisation the scales are quantised anew in any case.
    """

    def matches(self, layer: Any) -> bool:
        bnb: Any = sys.modules.get("bitsandbytes")
        return bnb is not None and isinstance(layer, bnb.nn.Linear4bit) and _four_bit_state(layer.weight) is not None

    def dense_weight(self, layer: Any) -> Tensor:
        return _dense(layer.weight)

    def stored_weight(self, layer: Any) -> Tensor:
        state = layer.weight.quant_state
        packed, _ = _codes(layer.weight)
        return torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[: math.prod(state.shape)].view(state.shape)

    def _cut_weight(self, layer: Any, index: Tensor, dim: int) -> None:
        old = layer.weight
        dense = self.dense_weight(layer).index_select(dim, index)
        kept = type(old)(
            dense,
            requires_grad=False,
            blocksize=old.quant_state.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=layer,
        )
        layer.weight = kept.to(dense.device)  # this quantises
        layer.weight.quant_state.dtype = _dtype(old.quant_state)
        _fit_for_cpu(layer)


class EightBitLinear(QuantisedLinear):
    """bitsandbytes' `Linear8bitLt` (LLM.int8(), Dettmers et al. 2022): one scale a row, so all cuts are exact."""

    def matches(self, layer: Any) -> bool:
        bnb: Any = sys.modules.get("bitsandbytes")
        if bnb is None or not isinstance(layer, bnb.nn.Linear8bitLt):
            return False
        return layer.weight.dtype == torch.int8 and _row_scales(layer) is not None

    def dense_weight(self, layer: Any) -> Tensor:
        return layer.weight.data.float() * (_row_scales(layer).unsqueeze(1) / 127)

    def stored_weight(self, layer: Any) -> Tensor:
        return layer.weight.data

    def _cut_weight(self, layer: Any, index: Tensor, dim: int) -> None:
        integers, scales = layer.weight.data.index_select(dim, index), _row_scales(layer)
        scales = scales.index_select(0, index) if dim == 0 else scales
        # the first forward pass moves them into the state, as after loading
        layer.weight = type(layer.weight)(integers, requires_grad=False, CB=integers, SCB=scales)
        layer.state.reset_grads()


def prepare_quantised(model: nn.Module) -> None:
    """Make a model with bitsandbytes layers, freshly loaded, fit to train and to prune; others are left as they are.

    Layers that the checkpoint has no weights for (a task head) are of bitsandbytes' types, too, but nothing quantised
    them; they become ordinary ones. 4-bit layers become right on CPUs, too (`_fit_for_cpu`).
    """
    for name, module in list(model.named_modules()):
        if _never_quantised(module):
            model.set_submodule(name, _ordinary(module))
        elif FOUR_BITS.matches(module):
            _fit_for_cpu(module)


def _never_quantised(layer: Any) -> bool:
    bnb: Any = sys.modules.get("bitsandbytes")
    if bnb is None or not isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
        return False
    return type(layer.weight) is nn.Parameter and layer.weight.is_floating_point()


def _ordinary(layer: Any) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight, linear.bias = layer.weight, layer.bias
    return linear.train(layer.training)


def _fit_for_cpu(layer: Any) -> None:
    """Make a 4-bit layer compute with its weight on CPUs as well, whatever its width.

    The weight stays in the layout it was loaded in: on CPUs with AVX512-BF16 bitsandbytes else packs it anew at the
    first forward pass in eval mode, which rounds the scales to bfloat16 for good and fails on widths other than
    multiples of 32 rows and of whole blocks. A kernel that takes the scales of other blocks is not used.
    """
    layer.support_avx512bf16_for_cpu = False
    state = layer.weight.quant_state
    if not _cpu_kernel_is_right(state.shape[1], state.blocksize):
        layer.__class__ = _block_wise()


@functools.cache
def _block_wise() -> type[Any]:
    """bitsandbytes' `Linear4bit` for rows that its kernel for CPUs gets wrong."""
    bnb: Any = sys.modules["bitsandbytes"]

    class BlockWiseLinear4bit(bnb.nn.Linear4bit):
        """Dequantises block by block instead of row by row, in which shape the same kernel is right."""

        def forward(self, x: Tensor) -> Tensor:
            """[..., in] -> [..., out]."""
            if x.device.type != "cpu":
                return super().forward(x)
            result = _BlockWise.apply(x.to(self.compute_dtype or x.dtype), self.weight)
            return (result if self.bias is None else result + self.bias.to(result.dtype)).to(x.dtype)

    return BlockWiseLinear4bit


class _BlockWise(torch.autograd.Function):
    """`x @ weight.T`; the backward pass dequantises once more, so that no dense weight is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return x @ _dense(weight).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ _dense(ctx.weight).to(gradient.dtype), None


def _row_scales(layer: Any) -> Any:
    """[out]; with the weight until the first forward pass, in the layer's state afterwards."""
    return layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB


def _four_bit_state(weight: Tensor) -> Any:
    """bitsandbytes' `QuantState` of a quantised weight; None for any other."""
    bnb: Any = sys.modules.get("bitsandbytes")
    return weight.quant_state if bnb is not None and isinstance(weight, bnb.nn.Params4bit) else None


def _codes(weight: Any) -> tuple[Tensor, Tensor]:
    """Two codes a byte, [ceil(numel / 2)], the first in the high bits; and scales [blocks] in float32."""
    functional: Any = sys.modules["bitsandbytes"].functional
    state, packed = copy.copy(weight.quant_state), weight.data
    if getattr(state, "packing_format_for_cpu", False):
        state.original_nested = False  # leaves the scales as they are
        packed, state = functional._convert_weight_packed_for_cpu_inverse(packed, state)
        scales = state.absmax.T.reshape(-1)
    elif state.nested:
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    else:
        scales = state.absmax
    return packed.contiguous().view(torch.uint8).flatten(), scales.float()


def _dense(weight: Any) -> Tensor:
    """A 4-bit weight, [out, in], in float32."""
    return _dequantised(*_codes(weight), weight.quant_state).view(weight.quant_state.shape)


def _dequantised(packed: Tensor, scales: Tensor, state: Any) -> Tensor:
    """[numel] in float32, with one block a row: in this shape bitsandbytes' kernels are right for all widths."""
    functional: Any = sys.modules["bitsandbytes"].functional
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


def _dtype(state: Any) -> torch.dtype:
    """What the weight was before it was quantised."""
    return state.original_dtype if getattr(state, "packing_format_for_cpu", False) else state.dtype


@functools.cache
def _cpu_kernel_is_right(width: int, blocksize: int) -> bool:
    """Whether bitsandbytes dequantises rows of `width` weights with the right scales on this CPU.

    Its AVX512 kernel (0.50) takes the scales of other blocks where rows are no whole blocks but multiples of 16.
    """
    functional: Any = sys.modules["bitsandbytes"].functional
    if width % blocksize == 0:
        return True
    rows = torch.arange(1.0, blocksize * width + 1).view(blocksize, width)  # many blocks, however narrow they are
    packed, state = functional.quantize_4bit(rows, blocksize=blocksize, quant_type="nf4")
    expected = _dequantised(packed.flatten(), state.absmax, state).view_as(rows)
    return torch.allclose(functional.dequantize_4bit(packed, state), expected)


# torchao


class TorchaoLinear(QuantisedLinear):
    """`nn.Linear` with a torchao weight in plain layout: integers in the weight's shape, one scale a row or a group.

    Weight-only kinds; with quantised activations there is no gradient to the layer's input. Cuts are exact but for
    single columns of grouped weights, whose groups are formed anew.
    """

    def matches(self, layer: Any) -> bool:
        weight = getattr(layer, "weight", None)
        kinds: Any = _torchao_types("Int8Tensor", "IntxUnpackedToInt8Tensor")
        if not isinstance(layer, nn.Linear) or not isinstance(weight, kinds):
            return False
        unused = ("act_quant_kwargs", "act_quant_scale", "act_pre_scale", "activation_quantization")
        return all(getattr(weight, name, None) is None for name in unused)

    def dense_weight(self, layer: Any) -> Tensor:
        return layer.weight.dequantize().float()

    def stored_weight(self, layer: Any) -> Tensor:
        return layer.weight.qdata

    def fault(self, layer: Any, width: int, dim: int) -> str | None:
        group = _group_size(layer.weight)
        if dim == 0 or group is None or width % group == 0:
            return None
        return f"{width} input features are no multiple of the {group} weights that share a scale"

    def _cut_weight(self, layer: Any, index: Tensor, dim: int) -> None:
        layer.weight = nn.Parameter(_cut_torchao(layer.weight, index, dim), requires_grad=False)


def _torchao_types(*names: str) -> tuple[type, ...]:
    torchao: Any = sys.modules.get("torchao.quantization")
    return tuple(getattr(torchao, name) for name in names if hasattr(torchao, name))


def _group_size(weight: Any) -> int | None:
    """Weights of a row that share a scale; None: all."""
    group = weight.block_size[1]
    return group if group < weight.shape[1] else None


def _cut_torchao(weight: Any, index: Tensor, dim: int) -> Tensor:
    """Rows (`dim` 0) or columns (`dim` 1) of a torchao tensor, of the same kind."""
    block = weight.block_size[dim]
    scale_index: Tensor | None = index // block if block < weight.shape[dim] else None  # None: one scale for all
    if scale_index is not None and block > 1:
        scale_index = _whole_blocks(index, block)
        if scale_index is None:
            return _regrouped(weight, index)
    size = list(weight.block_size)
    size[dim] = block if scale_index is not None else len(index)
    scale, zero_point = (
        value if value is None or scale_index is None else value.index_select(dim, scale_index)
        for value in (weight.scale, weight.zero_point)
    )
    return _like(weight, weight.qdata.index_select(dim, index), scale, zero_point, size)


def _whole_blocks(index: Tensor, block: int) -> Tensor | None:
    """The blocks that `index` consists of; None if it takes a part of one only."""
    if len(index) % block:
        return None
    starts = index[::block]
    whole = starts.unsqueeze(1) + torch.arange(block, device=index.device)
    return starts // block if bool((starts % block == 0).all()) and whole.flatten().equal(index) else None


def _regrouped(weight: Any, index: Tensor) -> Tensor:
    """Columns of a grouped weight, with groups and scales formed anew."""
    torchao: Any = sys.modules["torchao.quantization"]
    dense = weight.dequantize().index_select(1, index)
    centred = weight.zero_point is None or not bool(weight.zero_point.any())
    mapping = torchao.MappingType.SYMMETRIC if centred else torchao.MappingType.ASYMMETRIC
    if hasattr(weight, "target_dtype"):
        return type(weight).from_hp(dense, tuple(weight.block_size), weight.target_dtype, mapping_type=mapping)
    return type(weight).from_hp(dense, torchao.PerGroup(weight.block_size[1]), mapping_type=mapping)


def _like(weight: Any, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, block_size: Sequence[int]) -> Tensor:
    if hasattr(weight, "target_dtype"):
        return type(weight)(
            qdata,
            scale,
            zero_point,
            weight.target_dtype,
            tuple(block_size),
            weight.dtype,
            weight.activation_quantization,
        )
    return type(weight)(
        qdata, scale, list(block_size), weight.dtype, zero_point=zero_point, reduce_range=weight.reduce_range
    )


# All kinds


FOUR_BITS = FourBitLinear()
QUANTISED: tuple[QuantisedLinear, ...] = (FOUR_BITS, EightBitLinear(), TorchaoLinear())
"""The kinds of quantised linear layers that can be cut."""


def logical_numel(parameter: Tensor) -> int:
    """Weights that a parameter stands for; packed 4-bit weights are several an element."""
    state = _four_bit_state(parameter)
    return parameter.numel() if state is None else math.prod(state.shape)
