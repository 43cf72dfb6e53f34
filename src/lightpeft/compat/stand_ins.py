"""PyTorch: tensors without storage, and what they would take."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightpeft.compat.missing import missing, needed_for
from lightpeft.compat.torch import grouped_product, leaves_of, storage_of

__all__ = ["StandIn", "StorageWatch"]

try:
    from torch._subclasses.fake_tensor import FakeTensor as StandIn
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
except ImportError as _error:
    StandIn = missing("A forecast of memory and speed", _error)  # type: ignore[misc]
    TorchDispatchMode = missing("A forecast of memory and speed", _error)  # type: ignore[misc]
"""A tensor that knows its shape, type and device, and holds no values: what is computed with it gives others such."""


class StorageWatch(TorchDispatchMode):
    """Inside the block every tensor that is made is a stand-in, and counts for as long as something holds on to it.

    Where values are asked for, which stand-ins do not have: tensors are equal, a truth is false, a number 1, and what
    is counted by its value has each value equally often, as where a router sends equally many tokens to every expert.
    """

    def __init__(self, share: float = 1.0, formulas: Mapping[Any, Callable[..., int]] | None = None) -> None:
        """
        Args:
            share: part of a tensor's entries that count as not zero where somebody looks for those.
            formulas: operator -> floating-point operations of a call, given its arguments and, as `out_val`, its
                result. `FlopCounterMode` around a step would itself hold on to tensors, and change the peak.
        """
        super().__init__()
        self.now = self.peak = 0
        """Bytes of all storages that are held, and the most that they were."""
        self.flops = 0
        """Floating-point operations so far, as the formulas tell."""
        self.calls: set[tuple[Any, ...]] = set()
        """Of the operators that have a formula: which, and shape, strides and type of each tensor that it was given."""
        self._formulas = formulas or {}
        self._share = share
        self._sizes: dict[int, int] = {}
        with needed_for("A forecast of memory and speed"):
            self._stand_ins = FakeTensorMode(allow_non_fake_inputs=True)
            self._one_value = torch.ops.aten._local_scalar_dense.default
            self._grouped_product = grouped_product().default

    def __enter__(self) -> StorageWatch:
        self._stand_ins.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._stand_ins.__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten.equal.default:
            return True
        if func is self._one_value:
            dtype = args[0].dtype
            return False if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        if func is aten.nonzero.default:
            return self.counted(self._places(args[0]))
        if func is aten.bincount.default:
            return self._even_counts(*args, **(kwargs or {}))
        if func is self._grouped_product:  # its own stand-in takes no float32, which is computed all the same
            result = self.counted(_grouped(*args[:3]))
            self._count_result(func.overloadpacket, result, args, kwargs or {})
            return result
        if func is aten.index.Tensor:
            args = (args[0], [part for index in args[1] for part in self._as_numbers(index)])
        result = func(*args, **(kwargs or {}))
        self._count_result(func.overloadpacket, result, args, kwargs or {})
        for tensor in leaves_of(result):
            if isinstance(tensor, Tensor):
                self.counted(tensor)
        return result

    def _count_result(self, operator: Any, result: Any, args: Any, kwargs: Any) -> None:
        """Count what is computed."""
        if operator in self._formulas:
            self.flops += self._formulas[operator](*args, **kwargs, out_val=result)
            given = [each for each in leaves_of((args, kwargs)) if isinstance(each, Tensor)]
            self.calls.add((operator, *((each.shape, each.stride(), each.dtype) for each in given)))

    def counted(self, tensor: Tensor) -> Tensor:
        """The tensor, whose storage counts from now on."""
        storage, key = tensor.untyped_storage(), storage_of(tensor)
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key)
        return tensor

    def _as_numbers(self, index: Tensor | None) -> Iterable[Tensor | None]:
        """A mask as the numbers of what it takes, one tensor a dimension; another index as it is."""
        if index is None or index.dtype is not torch.bool:
            return [index]
        return self._places(index).unbind(1)

    @staticmethod
    def _even_counts(values: Tensor, weights: None = None, minlength: int = 0) -> Tensor:
        """A tensor with values: how often each of them is there."""
        whole, left = divmod(values.numel(), max(minlength, 1))
        with _disable_current_modes():
            return torch.tensor([whole + (number < left) for number in range(minlength)])

    def _places(self, mask: Tensor) -> Tensor:
        """Stand-ins for the places where something is not zero: [number, dimensions]."""
        return mask.new_empty((int(self._share * mask.numel() + 0.5), mask.dim()), dtype=torch.long)

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _grouped(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """A stand-in for products of groups: of some rows with a matrix each, or the gradient of those matrices."""
    if right.dim() == 3:
        return left.new_empty(left.shape[0], right.shape[-1])
    return left.new_empty(len(ends), left.shape[0], right.shape[-1])
