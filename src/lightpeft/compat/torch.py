"""PyTorch: tables of parameters and hooks, changes of tensors, the type of those that nobody gives one, and FSDP2."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import _composable_state
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


def changes_of(tensor: Tensor) -> int | None:
    """How often a tensor has been changed in place; None of one that does not count, because no graph can hold it."""
    return None if tensor.is_inference() else tensor._version


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


@contextmanager
def out_of_fsdp(model: nn.Module) -> Iterator[None]:
    """Inside the block a model that `fully_shard` (FSDP2) was applied to has no part in that, and can be cut.

    Its parameters lie sharded then (`DTensor`). Behind the block those that still do are sharded as they were, unit by
    unit, so that never more than one unit is whole; what was replicated (`ignored_params`) stays so. FSDP2 has no way
    back of its own: what it puts on a module is taken off here. Other models are left alone.
    """
    units = list(_units(model))
    for unit in units:
        unit.release()
    gc.collect()  # its groups refer to one another, and hold the shards
    yield
    there = set(model.modules())
    for unit in units:
        unit.shard([module for module in unit.modules if module in there])


@dataclass(frozen=True)
class _Unit:
    """Modules whose parameters `fully_shard` gathers together, and what it was told."""

    modules: tuple[nn.Module, ...]
    options: dict[str, Any]

    def release(self) -> None:
        """Take off the modules what `fully_shard` put on them."""
        state = _fsdp_state(self.modules[0])
        handles = {state._pre_forward_hook_handle, state._post_forward_hook_handle}
        for group in state._fsdp_param_groups:
            handles.update(group._module_to_pre_save_state_dict_hook_handle.values())
            handles.update(group._module_to_pre_load_state_dict_hook_handle.values())
            handles.update(parameter._post_load_hook_handle for parameter in group.fsdp_params)
        for handle in handles:
            handle.remove()
        for module in self.modules:
            kind: Any = type(module)
            module.__class__ = kind.__mro__[kind._orig_cls_mro_index]
            _composable_state._module_state_mapping.pop(module)
            for key in (STATE_KEY, REGISTRY_KEY):
                vars(module).pop(key, None)

    def shard(self, modules: list[nn.Module]) -> None:
        """Shard what is left of the modules, as they were."""
        places = [(part, name) for module in modules for part in _outside_units(module) for name in part._parameters]
        whole: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
        ignored = set()
        for part, name in places:
            parameter = part._parameters[name]
            if isinstance(parameter, DTensor):
                values = parameter.detach().full_tensor() if parameter not in whole else whole[parameter]
                set_unseen(part, name, whole.setdefault(parameter, nn.Parameter(values, parameter.requires_grad)))
            elif parameter is not None:
                ignored.add(parameter)
        if modules:
            whole.clear()
            together: Any = modules if len(modules) > 1 else modules[0]
            fully_shard(together, ignored_params=ignored, **self.options)


def _units(model: nn.Module) -> Iterator[_Unit]:
    """From the innermost out, as `fully_shard` wants them."""
    seen = set()
    for module in reversed(list(model.modules())):
        if not isinstance(module, FSDPModule) or (state := _fsdp_state(module)) in seen:
            continue
        seen.add(state)
        module.reshard()
        options: dict[str, Any] = {"mp_policy": state._mp_policy}
        for group in state._fsdp_param_groups:
            options |= {"mesh": group.mesh_info.mesh, "offload_policy": group.offload_policy}
            if not state._auto_reshard_after_forward:
                options["reshard_after_forward"] = group.post_forward_mesh_info is not None
        yield _Unit(tuple(state._modules), options)


def _fsdp_state(module: Any) -> Any:
    return module._get_fsdp_state()


def _outside_units(module: nn.Module) -> Iterator[nn.Module]:
    """The module and what is inside it, but for what is sharded by itself."""
    yield module
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _outside_units(child)
