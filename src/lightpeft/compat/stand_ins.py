"""PyTorch: fake tensors without storage, to predict memory and floating-point operations."""

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
"""Fake tensor with shape, data type and device but no values; operations on it return fake tensors."""


class StorageWatch(TorchDispatchMode):
    """Mode in which every new tensor is a fake one, and its bytes are counted while something refers to it.

    Operations that need values get substitutes: tensors are equal, a bool is False, a number is 1, and `bincount`
    returns equal counts, as if a router sent equally many tokens to every expert.
    """

    def __init__(self, share: float = 1.0, formulas: Mapping[Any, Callable[..., int]] | None = None) -> None:
        """
        Args:
            share: part of a tensor's entries that `nonzero` and masks select.
            formulas: operator -> function that returns the floating-point operations of a call, from its arguments
                and, as `out_val`, its result. (`FlopCounterMode` would keep references to tensors and change the peak.)
        """
        super().__init__()
        self.now = self.peak = 0
        """Bytes of all live storages, now and at the peak."""
        self.flops = 0
        """Floating-point operations so far, by the formulas."""
        self.calls: set[tuple[Any, ...]] = set()
        """Distinct calls of operators with a formula: operator, and (shape, strides, dtype) of each tensor argument."""
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
            return self.count_storage(self._places(args[0]))
        if func is aten.bincount.default:
            return self._even_counts(*args, **(kwargs or {}))
        if func is self._grouped_product:  # the fake version refuses float32, which the real one accepts
            result = self.count_storage(_fake_grouped_product(*args[:3]))
            self._count_result(func.overloadpacket, result, args, kwargs or {})
            return result
        if func is aten.index.Tensor:
            args = (args[0], [part for index in args[1] for part in self._as_numbers(index)])
        result = func(*args, **(kwargs or {}))
        self._count_result(func.overloadpacket, result, args, kwargs or {})
        for tensor in leaves_of(result):
            if isinstance(tensor, Tensor):
                self.count_storage(tensor)
        return result

    def _count_result(self, operator: Any, result: Any, args: Any, kwargs: Any) -> None:
        """Add the floating-point operations of a call, if its operator has a formula."""
        if operator in self._formulas:
            self.flops += self._formulas[operator](*args, **kwargs, out_val=result)
            given = [each for each in leaves_of((args, kwargs)) if isinstance(each, Tensor)]
            self.calls.add((operator, *((each.shape, each.stride(), each.dtype) for each in given)))

    def count_storage(self, tensor: Tensor) -> Tensor:
        """Count the bytes of a tensor's storage from now until it is freed, and return the tensor."""
        storage, key = tensor.untyped_storage(), storage_of(tensor)
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._subtract_storage, key)
        return tensor

    def _as_numbers(self, index: Tensor | None) -> Iterable[Tensor | None]:
        """Convert a mask to index tensors, one per dimension; other indices are returned as they are."""
        if index is None or index.dtype is not torch.bool:
            return [index]
        return self._places(index).unbind(1)

    @staticmethod
    def _even_counts(values: Tensor, weights: None = None, minlength: int = 0) -> Tensor:
        """Return a real tensor of counts, [minlength], that are as equal as possible."""
        whole, left = divmod(values.numel(), max(minlength, 1))
        with _disable_current_modes():
            return torch.tensor([whole + (number < left) for number in range(minlength)])

    def _places(self, mask: Tensor) -> Tensor:
        """Return a fake result of `nonzero`: [selected entries, dimensions], long."""
        return mask.new_empty((int(self._share * mask.numel() + 0.5), mask.dim()), dtype=torch.long)

    def _subtract_storage(self, key: int) -> None:
        """Subtract the bytes of a storage that was freed."""
        self.now -= self._sizes.pop(key)


def _fake_grouped_product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Return a fake result of `grouped_mm`: rows times the matrix of their group, or the gradient of these matrices."""
    if right.dim() == 3:
        return left.new_empty(left.shape[0], right.shape[-1])
    return left.new_empty(len(ends), left.shape[0], right.shape[-1])
