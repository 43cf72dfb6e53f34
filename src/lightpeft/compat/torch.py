"""PyTorch: tables and hooks of modules; versions, recomputation, reads and default data type of tensors."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from torch.overrides import TorchFunctionMode

from lightpeft.compat.missing import needed_for


def attention_of_cpus() -> tuple[Any, Any]:
    """Return the operators of `scaled_dot_product_attention` on a CPU: forward and backward."""
    with needed_for("Counting what attention computes on a CPU"):
        aten = torch.ops.aten
        return (
            aten._scaled_dot_product_flash_attention_for_cpu,
            aten._scaled_dot_product_flash_attention_for_cpu_backward,
        )


def grouped_product() -> Any:
    """Return the operator of `torch.nn.functional.grouped_mm`."""
    with needed_for("Counting what routed experts compute"):
        return torch.ops.aten._grouped_mm


def leaves_of(tree: Any) -> Iterator[Any]:
    """Yield the leaves of nested lists, tuples and mappings."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        for each in tree:
            yield from leaves_of(each)
    else:
        yield tree


def change_count(tensor: Tensor) -> object:
    """Return a tensor's version, which counts in-place changes; None for an inference tensor, which has none.

    If PyTorch has no versions, each call returns a value that equals no other.
    """
    return None if tensor.is_inference() else getattr(tensor, "_version", object())


_DEEPEST = 3
"""Most autograd nodes in a chain that is recomputed; a norm's output in half precision needs three."""
_ACTIVATIONS: dict[str, Callable[[Any], Tensor]] = {
    "SiluBackward0": lambda node: silu(node._saved_self),
    "GeluBackward0": lambda node: gelu(node._saved_self, approximate=node._saved_approximate),
}
_PRODUCT, _CONVERTED = "MulBackward0", "ToCopyBackward0"


def maker_of(tensor: Tensor) -> partial[Tensor] | None:
    """Return a function that recomputes a tensor bitwise from other tensors that autograd saves; None: none is cheap.

    Activation functions save their input, a product saves each factor for the gradient of the other, and autograd
    functions in Python may define a static method `recompute(node)`. The result may be multiplied with a frozen
    factor, as in a norm, and converted. Nodes free their saved tensors when the backward pass has used them; the
    consumers of the tensor come before that, so they can still recompute it.
    """
    node = tensor.grad_fn
    if node is None or getattr(tensor, "_base", tensor) is not None:
        return None
    if node.name() != _CONVERTED:
        return partial(_recompute_result, node) if _is_recomputable(node, _DEEPEST) else None
    source = node.next_functions[0][0]
    return (
        partial(_recompute_converted, source, tensor.device, tensor.dtype)
        if _is_recomputable(source, _DEEPEST - 1)
        else None
    )


def _is_recomputable(node: Any, depth: int) -> bool:
    """Return True if a node's result can be recomputed from saved tensors, through at most `depth` nodes."""
    if node is None or depth == 0:
        return False
    if _custom_recompute(node) is not None:
        return True
    keeps = hasattr(type(node), "_saved_self")
    if node.name() in _ACTIVATIONS:
        return keeps and (node.name() != "GeluBackward0" or hasattr(type(node), "_saved_approximate"))
    if node.name() != _PRODUCT or not keeps or not hasattr(type(node), "_saved_other"):
        return False
    factors = [factor for factor, _ in node.next_functions]
    return None not in factors or any(_is_recomputable(factor, depth - 1) for factor in factors)


def _custom_recompute(node: Any) -> Callable[[Any], Tensor] | None:
    """Return the method `recompute` of a node's autograd function in Python; None: it has none."""
    way: Callable[[Any], Tensor] | None = getattr(getattr(node, "_forward_cls", None), "recompute", None)
    return way


def _recompute_result(node: Any) -> Tensor:
    """Recompute the result of a node."""
    way = _ACTIVATIONS.get(node.name()) or _custom_recompute(node)
    if way is not None:
        return way(node)
    one, other = (factor for factor, _ in node.next_functions)  # a frozen one has no node, and the other is not kept
    first: Tensor = _recompute_result(one) if other is None else node._saved_self
    return first * (_recompute_result(other) if one is None else node._saved_other)


def _recompute_converted(node: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Recompute the result of a node, and convert it."""
    return _recompute_result(node).to(device, dtype)


def softmax_backward(gradient: Tensor, result: Tensor) -> Tensor:
    """Compute the gradient of the input of a softmax over the last dimension, in one pass over memory.

    Args:
        gradient: gradient of `result`, with its shape and data type.
        result: output of the softmax.
    """
    kernel = getattr(torch, "_softmax_backward_data", None)
    if kernel is None:
        return result * (gradient - (gradient * result).sum(-1, keepdim=True))
    given: Tensor = kernel(gradient, result, -1, result.dtype)
    return given


def layer_norm_backward(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of a layer norm's input and weight by PyTorch's kernel.

    Args:
        gradient: gradient of the result, [..., channels].
        x: input, [..., channels].
        mean, inverse: mean of `x` over its channels, and reciprocal of the standard deviation, [..., 1].
        weight: [channels].
        wanted: True for each of the two gradients to compute; the other is None.
    """
    shape = [len(weight)]
    given = torch.ops.aten.native_layer_norm_backward(
        gradient, x, shape, mean, inverse, weight, None, [wanted[0], wanted[1], False]
    )
    return given[0], given[1]


def storage_of(tensor: Tensor) -> int:
    """Return a number that identifies a tensor's storage during its life, also if the storage has no memory."""
    storage = tensor.untyped_storage()
    return int(getattr(storage, "_cdata", 0) or storage.data_ptr() or id(tensor))


def has_hooks(module: nn.Module) -> bool:
    """Return True if a module has hooks that may read or change its computation, or if PyTorch does not tell."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, True) for name in names)


def with_own_parameters(module: nn.Module) -> nn.Module:
    """Return a shallow copy of a module with its own table of parameters: setting one does not change the original."""
    twin = copy.copy(module)
    with needed_for(_TABLES):
        twin.__dict__["_parameters"] = dict(module._parameters)
    return twin


_TABLES = "Weights that come and go (low_memory, weights_on_disk, FSDP2, forecasts of memory)"


def set_without_hooks(module: nn.Module, name: str, parameter: Any) -> None:
    """Replace a parameter of a module without calling registration hooks."""
    with needed_for(_TABLES):
        module._parameters[name] = parameter


class _DefaultDtype(TorchFunctionMode):
    """Mode that converts new tensors of the default data type to another one, unless the call gives a data type."""

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
        given = (each for each in leaves_of((args, kwargs)) if isinstance(each, Tensor))
        if said or any(each.is_floating_point() for each in given):
            return result
        return result.to(self._asked[-1])


_OF_THREAD = threading.local()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the default floating-point data type inside the block, for this thread only; blocks nest.

    `torch.set_default_dtype` applies to all threads, and would change their computations. This is meant for the meta
    device: on other devices, tensors are computed in the process's default type and then rounded.
    """
    asked = vars(_OF_THREAD).setdefault("asked", [])
    asked.append(dtype)
    try:
        with _DefaultDtype(asked) if len(asked) == 1 else nullcontext():
            yield
    finally:
        asked.pop()


_QUERIES = frozenset({"__get__", "is_floating_point", "dim", "size"})
_CONVERTED_BY = frozenset({"to", "cpu", "cuda", "float", "double", "half", "bfloat16", "detach", "clone"})
"""Names of functions that compute nothing: `_QUERIES` query a tensor's properties, `_CONVERTED_BY` convert it."""


class ReadRecorder(Tensor):
    """A tensor that records if anything was computed from it; results are plain tensors.

    Model wrappers (FSDP2, DistributedDataParallel) query the data type of all inputs and convert them. A query does not
    count as a read, and a converted tensor shares the record of its source.
    """

    _plain: Tensor
    _readers: list[str]

    @classmethod
    def of(cls, tensor: Tensor | float) -> ReadRecorder:
        """Return a view of a tensor that records reads."""
        return cls._recording(torch.as_tensor(tensor), [])

    @classmethod
    def _recording(cls, tensor: Tensor, readers: list[str]) -> ReadRecorder:
        noted = tensor.as_subclass(cls)
        noted._plain, noted._readers = tensor, readers
        return noted

    @property
    def read(self) -> bool:
        """True if anything was computed from the tensor."""
        return bool(self._readers)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function with plain tensors, and record the read."""
        result, name = func(*_without_recorders(args), **_without_recorders(kwargs or {})), func.__name__
        if name in _CONVERTED_BY and isinstance(args[0], cls):
            return cls._recording(result, args[0]._readers)
        for each in leaves_of((args, kwargs)):
            if isinstance(each, cls) and name not in _QUERIES:
                each._readers.append(name)
        return result


def _without_recorders(tree: Any) -> Any:
    """Replace recording tensors by plain ones in nested lists, tuples and dicts."""
    if isinstance(tree, ReadRecorder):
        return tree._plain
    if isinstance(tree, dict):
        return {key: _without_recorders(each) for key, each in tree.items()}
    return type(tree)(_without_recorders(each) for each in tree) if type(tree) in (list, tuple) else tree
