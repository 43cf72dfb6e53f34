"""FSDP2 of PyTorch: take a model out of it, and shard it again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lightpeft.compat.missing import needed_for
from lightpeft.compat.torch import set_without_hooks


@contextmanager
def out_of_fsdp(model: nn.Module) -> Iterator[None]:
    """Undo `fully_shard` (FSDP2) inside the block, so that a model can be cut, and shard it again afterwards.

    Inside the block parameters are sharded tensors (`DTensor`). After it, those that still are get sharded as before,
    unit by unit, so that at most one unit is whole at a time; all others stay replicated (`ignored_params`). FSDP2
    cannot be undone by its own means, so this removes hooks and state from the modules. Other models are unchanged.

    Raises:
        LightPeftError: this release of PyTorch has other internals.
    """
    with needed_for("The cut of a model that FSDP2 shards"):
        units = list(_units(model))
        for unit in units:
            unit.release()
    gc.collect()  # FSDP2's parameter groups form reference cycles that hold the shards
    yield
    there = set(model.modules())
    for unit in units:
        unit.shard([module for module in unit.modules if module in there])


@dataclass(frozen=True)
class _Unit:
    """Modules whose parameters `fully_shard` gathers together, and its arguments."""

    modules: tuple[nn.Module, ...]
    options: dict[str, Any]

    def release(self) -> None:
        """Remove hooks, state and class of `fully_shard` from the modules."""
        from torch.distributed import _composable_state
        from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

        state = _fsdp_state(self.modules[0])
        handles = {state._pre_forward_hook_handle, state._post_forward_hook_handle}
        for group in _parameter_groups(state):
            handles.update(group._module_to_pre_save_state_dict_hook_handle.values())
            handles.update(group._module_to_pre_load_state_dict_hook_handle.values())
            handles.update(parameter._post_load_hook_handle for parameter in group.fsdp_params)
        for handle in handles:
            handle.remove()
        for module in self.modules:
            # FSDP2 sets a class that derives from the module's own and `FSDPModule`
            own: Any = next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
            module.__class__ = own
            _composable_state._module_state_mapping.pop(module)
            for key in (STATE_KEY, REGISTRY_KEY):
                vars(module).pop(key, None)

    def shard(self, modules: list[nn.Module]) -> None:
        """Shard the modules that are left with the same arguments as before."""
        places = [(part, name) for module in modules for part in _outside_units(module) for name in part._parameters]
        whole: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
        ignored = set()
        for part, name in places:
            parameter = part._parameters[name]
            if isinstance(parameter, DTensor):
                values = parameter.detach().full_tensor() if parameter not in whole else whole[parameter]  # type: ignore[unreachable]
                set_without_hooks(
                    part, name, whole.setdefault(parameter, nn.Parameter(values, parameter.requires_grad))
                )
            elif parameter is not None:
                ignored.add(parameter)
        if modules:
            whole.clear()
            together: Any = modules if len(modules) > 1 else modules[0]
            fully_shard(together, ignored_params=ignored, **self.options)


def _units(model: nn.Module) -> Iterator[_Unit]:
    """Yield the units of a model from the innermost out, the order that `fully_shard` needs."""
    seen = set()
    for module in reversed(list(model.modules())):
        if not isinstance(module, FSDPModule) or (state := _fsdp_state(module)) in seen:
            continue
        seen.add(state)
        module.reshard()
        options: dict[str, Any] = {"mp_policy": state._mp_policy}
        for group in _parameter_groups(state):
            options |= {"mesh": group.mesh_info.mesh, "offload_policy": group.offload_policy}
            if not state._auto_reshard_after_forward:
                options["reshard_after_forward"] = group.post_forward_mesh_info is not None
        yield _Unit(tuple(state._modules), options)


def _parameter_groups(state: Any) -> list[Any]:
    """Return the parameter groups of a module's state; PyTorch 2.9 has at most one."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _fsdp_state(module: Any) -> Any:
    return module._get_fsdp_state()


def _outside_units(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module and its descendants, except units of their own."""
    yield module
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _outside_units(child)
