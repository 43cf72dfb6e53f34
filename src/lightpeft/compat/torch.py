"""PyTorch: parameters' tables and hooks; tensors: changes, makers, readers, and the type of those without one."""

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
    """What `scaled_dot_product_attention` is on a CPU, forward and backward."""
    with needed_for("Counting what attention computes on a CPU"):
        aten = torch.ops.aten
        return (
            aten._scaled_dot_product_flash_attention_for_cpu,
            aten._scaled_dot_product_flash_attention_for_cpu_backward,
        )


def grouped_product() -> Any:
    """What `torch.nn.functional.grouped_mm` is."""
    with needed_for("Counting what routed experts compute"):
        return torch.ops.aten._grouped_mm


def leaves_of(tree: Any) -> Iterator[Any]:
    """All that is in lists, tuples and mappings, and in those that are in these."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        for each in tree:
            yield from leaves_of(each)
    else:
        yield tree


def changes_of(tensor: Tensor) -> object:
    """How often a tensor has been changed in place; None of one that does not count, because no graph can hold it.

    Where PyTorch does not tell, no answer is equal to another one.
    """
    return None if tensor.is_inference() else getattr(tensor, "_version", object())


_DEEPEST = 3
"""Nodes of the graph, one behind another, through which something is made again: a norm's output in half precision."""
_ACTIVATIONS: dict[str, Callable[[Any], Tensor]] = {
    "SiluBackward0": lambda node: silu(node._saved_self),
    "GeluBackward0": lambda node: gelu(node._saved_self, approximate=node._saved_approximate),
}
_PRODUCT, _CONVERTED = "MulBackward0", "ToCopyBackward0"


def maker_of(tensor: Tensor) -> partial[Tensor] | None:
    """What makes a tensor again, to the last bit, from what the autograd graph keeps; None: nothing does cheaply.

    Activation functions keep what enters them, a product keeps each factor for the gradient of the other, and functions
    in Python may say how (`made_again`). What is made so may be multiplied with something frozen, as in a norm, and
    converted. It can be called as long as nobody needs it: the graph lets go of what nodes keep when their turn comes,
    and those that were handed the tensor precede.
    """
    node = tensor.grad_fn
    if node is None or getattr(tensor, "_base", tensor) is not None:
        return None
    if node.name() != _CONVERTED:
        return partial(_recomputed, node) if _is_recomputable(node, _DEEPEST) else None
    source = node.next_functions[0][0]
    return partial(_converted, source, tensor.device, tensor.dtype) if _is_recomputable(source, _DEEPEST - 1) else None


def _is_recomputable(node: Any, depth: int) -> bool:
    """Whether the graph keeps all that a node's result is made of, or makes that in turn."""
    if node is None or depth == 0:
        return False
    if _own_way(node) is not None:
        return True
    keeps = hasattr(type(node), "_saved_self")
    if node.name() in _ACTIVATIONS:
        return keeps and (node.name() != "GeluBackward0" or hasattr(type(node), "_saved_approximate"))
    if node.name() != _PRODUCT or not keeps or not hasattr(type(node), "_saved_other"):
        return False
    factors = [factor for factor, _ in node.next_functions]
    return None not in factors or any(_is_recomputable(factor, depth - 1) for factor in factors)


def _own_way(node: Any) -> Callable[[Any], Tensor] | None:
    """How the node of a function in Python makes its result again: `made_again(node)`, where the function has that."""
    way: Callable[[Any], Tensor] | None = getattr(getattr(node, "_forward_cls", None), "made_again", None)
    return way


def _recomputed(node: Any) -> Tensor:
    way = _ACTIVATIONS.get(node.name()) or _own_way(node)
    if way is not None:
        return way(node)
    one, other = (factor for factor, _ in node.next_functions)  # a frozen one has no node, and the other is not kept
    first: Tensor = _recomputed(one) if other is None else node._saved_self
    return first * (_recomputed(other) if one is None else node._saved_other)


def _converted(node: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _recomputed(node).to(device, dtype)


def softmax_backward(gradient: Tensor, result: Tensor) -> Tensor:
    """The gradient of what went into a softmax over the last dimension, in one pass.

    Args:
        gradient: that of `result`, of its shape and type.
        result: what the softmax gave.
    """
    kernel = getattr(torch, "_softmax_backward_data", None)
    if kernel is None:
        return result * (gradient - (gradient * result).sum(-1, keepdim=True))
    given: Tensor = kernel(gradient, result, -1, result.dtype)
    return given


def layer_norm_backward(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of what a layer norm is given, and of its weight, by PyTorch's kernel.

    Args:
        gradient: that of its result, of the shape of `x`, [..., channels].
        mean, inverse: of `x` over its channels, and one by the standard deviation, [..., 1].
        wanted: which of the two are; None for the other.
    """
    shape = [len(weight)]
    given = torch.ops.aten.native_layer_norm_backward(
        gradient, x, shape, mean, inverse, weight, None, [wanted[0], wanted[1], False]
    )
    return given[0], given[1]


def storage_of(tensor: Tensor) -> int:
    """What the storage of a tensor is known by as long as it lives, one without memory included."""
    storage = tensor.untyped_storage()
    return int(getattr(storage, "_cdata", 0) or storage.data_ptr() or id(tensor))


def is_watched(module: nn.Module) -> bool:
    """Whether hooks see, or may change, what the module computes; where PyTorch does not tell, they may."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, True) for name in names)


def with_own_parameters(module: nn.Module) -> nn.Module:
    """A copy of the module that holds the same parameters, until its own are set; all else is shared."""
    twin = copy.copy(module)
    with needed_for(_TABLES):
        twin.__dict__["_parameters"] = dict(module._parameters)
    return twin


_TABLES = "Weights that come and go (low_memory, weights_on_disk, FSDP2, forecasts of memory)"


def set_unseen(module: nn.Module, name: str, parameter: Any) -> None:
    """Set a parameter that the module has already; hooks on the registration of parameters are not called."""
    with needed_for(_TABLES):
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
        given = (each for each in leaves_of((args, kwargs)) if isinstance(each, Tensor))
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


_ASKED = frozenset({"__get__", "is_floating_point", "dim", "size"})
_CONVERTED_BY = frozenset({"to", "cpu", "cuda", "float", "double", "half", "bfloat16", "detach", "clone"})
"""Names of functions that compute nothing: they say what a tensor is like, or give it on a device and in a type."""


class Noted(Tensor):
    """A tensor that notes whether something was computed from it; what is computed is a plain one.

    Wrappers of models (FSDP2, DistributedDataParallel) ask all tensors that go in for their type, and convert them: to
    be asked is not to be read, and what was converted notes for both.
    """

    _plain: Tensor
    _readers: list[str]

    @classmethod
    def of(cls, tensor: Tensor | float) -> Noted:
        """A view of a tensor that nobody has read."""
        return cls._noting(torch.as_tensor(tensor), [])

    @classmethod
    def _noting(cls, tensor: Tensor, readers: list[str]) -> Noted:
        noted = tensor.as_subclass(cls)
        noted._plain, noted._readers = tensor, readers
        return noted

    @property
    def read(self) -> bool:
        """Whether something was computed from it."""
        return bool(self._readers)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, of which it is an argument."""
        result, name = func(*_with_plain(args), **_with_plain(kwargs or {})), func.__name__
        if name in _CONVERTED_BY and isinstance(args[0], cls):
            return cls._noting(result, args[0]._readers)
        for each in leaves_of((args, kwargs)):
            if isinstance(each, cls) and name not in _ASKED:
                each._readers.append(name)
        return result


def _with_plain(tree: Any) -> Any:
    """The tree, with plain tensors in place of those that note."""
    if isinstance(tree, Noted):
        return tree._plain
    if isinstance(tree, dict):
        return {key: _with_plain(each) for key, each in tree.items()}
    return type(tree)(_with_plain(each) for each in tree) if type(tree) in (list, tuple) else tree
