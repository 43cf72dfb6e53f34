"""torchao: what its quantised weights are made of, and how to make others like them. It is not imported here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def is_weight_only(weight: Any) -> bool:
    """Whether it is a weight of integers in its own shape, with one scale a row or a group, whose activations are not
    quantised."""
    if not isinstance(weight, _types("Int8Tensor", "IntxUnpackedToInt8Tensor")):
        return False
    unused = ("act_quant_kwargs", "act_quant_scale", "act_pre_scale", "activation_quantization")
    return all(getattr(weight, name, None) is None for name in unused)


def of_parts(old: Any, integers: Tensor, scale: Tensor, zero_point: Tensor | None, block_size: Sequence[int]) -> Tensor:
    """A weight as `old` is, of other integers [out, in] and scales; `block_size` says how many share one each way."""
    if _may_be_narrower(old):
        settings = (old.target_dtype, tuple(block_size), old.dtype, old.activation_quantization)
        return type(old)(integers, scale, zero_point, *settings)
    return type(old)(integers, scale, list(block_size), old.dtype, zero_point=zero_point, reduce_range=old.reduce_range)


def quantised_like(old: Any, dense: Tensor) -> Tensor:
    """A weight [out, in] quantised in groups of a row as `old` was, with groups and scales formed anew."""
    torchao: Any = sys.modules["torchao.quantization"]
    centred = old.zero_point is None or not bool(old.zero_point.any())
    mapping = torchao.MappingType.SYMMETRIC if centred else torchao.MappingType.ASYMMETRIC
    if _may_be_narrower(old):
        return type(old).from_hp(dense, tuple(old.block_size), old.target_dtype, mapping_type=mapping)
    return type(old).from_hp(dense, torchao.PerGroup(old.block_size[1]), mapping_type=mapping)


def _may_be_narrower(weight: Any) -> bool:
    """Whether it is of the class whose integers may use less than the 8 bits they are kept in."""
    return hasattr(weight, "target_dtype")


def _types(*names: str) -> tuple[type, ...]:
    torchao: Any = sys.modules.get("torchao.quantization")
    return tuple(getattr(torchao, name) for name in names if hasattr(torchao, name))
