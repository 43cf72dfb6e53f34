"""PyTorch: tables of parameters and hooks, changes of tensors, the type of those that nobody gives one, and tensors
without storage."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU_ATTENTION: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
"""What `scaled_dot_product_attention` is on a CPU."""
StandIn = FakeTensor
"""A tensor that knows its shape, type and device, and holds no values: what is computed with it gives others such."""


def changes_of(tensor: Tensor) -> int | None:
    """How often a tensor has been changed in place; None of one that does not count, because no graph can hold it."""
    return None if tensor.is_inference() else tensor._version


def storage_of(tensor: Tensor) -> int:
    """What the storage of a tensor is known by as long as it lives, one without memory included."""
    return int(tensor.untyped_storage()._cdata)


def is_watched(module: nn.Module) -> bool:
    """Whether hooks see, or may change, what the module computes."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def with_own_parameters(module: nn.Module) -> nn.Module:
    """A copy of the module that holds the same parameters, until its own are set; all else is shared."""
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = dict(module._parameters)
    return twin


def is_convolution(module: nn.Module) -> bool:
    """Whether the module is a convolution, transposed ones among them, over whatever number of dimensions."""
    return isinstance(module, nn.modules.conv._ConvNd)


def set_unseen(module: nn.Module, name: str, parameter: Any) -> None:
    """Set a parameter that the module has already; hooks on the registration of parameters are not called."""
    module._parameters[name] = parameter


class _DefaultDtype(TorchFunctionMode):
    """Gives tensors another type after they were made, as far as nobody said theirs."""

    _SAYS_TYPE = (Tensor.to, Tensor.float, Tensor.type)

    def __init__(self, asked: list[torch.dtype]) -> None:
        super().__init__()
        self._asked = asked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or result.dtype != torch.get_default_dtype():
            return result
        said = kwargs.get("dtype") is not None or func in self._SAYS_TYPE
        given = (each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor))
        if said or any(each.is_floating_point() for each in given):
            return result
        return result.to(self._asked[-1])


_OF_THREAD = threading.local()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside the block, in this thread alone, a floating-point tensor that nobody gives a type is of this one.

    `torch.set_default_dtype` is for all threads, and would change what others compute meanwhile. This is for the meta
    device: what it makes elsewhere is computed in the default type and rounded then. Blocks nest.
    """
    asked = vars(_OF_THREAD).setdefault("asked", [])
    asked.append(dtype)
    try:
        with _DefaultDtype(asked) if len(asked) == 1 else nullcontext():
            yield
    finally:
        asked.pop()


class StorageWatch(TorchDispatchMode):
    """Inside the block every tensor that is made is a stand-in, and counts for as long as something holds on to it.

    Where values are asked for, which stand-ins do not have: tensors are equal, a truth is false, a number 1.
    """

    def __init__(self, share: float = 1.0) -> None:
        """
        Args:
            share: part of a tensor's entries that count as not zero where somebody looks for those.
        """
        super().__init__()
        self.now = self.peak = 0
        """Bytes of all storages that are held, and the most that they were."""
        self._share = share
        self._sizes: dict[int, int] = {}
        self._stand_ins = FakeTensorMode(allow_non_fake_inputs=True)

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
        if func is aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return False if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        if func is aten.nonzero.default:
            return self.counted(self._places(args[0]))
        if func is aten.index.Tensor:
            args = (args[0], [part for index in args[1] for part in self._as_numbers(index)])
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.counted(tensor)
        return result

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

    def _places(self, mask: Tensor) -> Tensor:
        """Stand-ins for the places where something is not zero: [number, dimensions]."""
        return mask.new_empty((int(self._share * mask.numel() + 0.5), mask.dim()), dtype=torch.long)

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
