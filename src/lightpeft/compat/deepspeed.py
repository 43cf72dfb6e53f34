"""DeepSpeed: parameters that ZeRO-3 shares, taken out and put in again, and the engine that trains them."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightpeft.compat.torch import set_unseen


def in_zero3(parameter: Tensor) -> bool:
    """Whether ZeRO-3 shares a parameter among processes; it is empty but where the model is computing with it."""
    return hasattr(parameter, "ds_tensor")


def logical_shape(parameter: Any) -> torch.Size:
    """The shape of the whole parameter, shared or not."""
    return parameter.ds_shape if in_zero3(parameter) else parameter.shape


def whole_of_zero3(parameter: Tensor) -> Tensor:
    """A copy of all of a parameter that ZeRO-3 shares; all processes have to call this."""
    with gathered([parameter]):
        return parameter.detach().clone()


@contextmanager
def gathered(parameters: Iterable[Tensor], *, changed: bool = False) -> Iterator[None]:
    """Inside the block all processes have those parameters whole that ZeRO-3 shares; all have to enter it together.

    Args:
        changed: the block changes them, in all processes alike.
    """
    shared = [each for each in parameters if in_zero3(each) and (changed or not _is_there(each))]
    if not shared:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(shared, modifier_rank=0 if changed else None):
        yield


def hold_whole(model: nn.Module) -> None:
    """Let every process have whole what trains, until the model next computes; all have to call this."""
    absent: list[Any] = [p for p in model.parameters() if p.requires_grad and in_zero3(p) and not _is_there(p)]
    if absent:
        absent[0].all_gather(param_list=absent)


@contextmanager
def out_of_zero3(model: nn.Module) -> Iterator[None]:
    """Inside the block a model whose parameters ZeRO-3 shares can be cut: every process has whole what trains, and of
    what is frozen a part (`DTensor`).

    Behind the block they are shared again, one after the other, so that never more than one that is frozen is whole.
    The model can answer then; before it trains its engine has to be made anew (`renew_engine`). Other models are left
    alone.
    """
    shared = [(part, name, p) for part, name, p in _places(model) if in_zero3(p)]
    if not shared:
        yield
        return
    known: Any = shared[0][2]
    mesh = init_device_mesh(known.ds_tensor.device.type, (torch.distributed.get_world_size(),))
    replaced: dict[Tensor, nn.Parameter] = {}  # tied weights stay tied
    for part, name, parameter in shared:
        if parameter not in replaced:
            values = whole_of_zero3(parameter)
            if not parameter.requires_grad:
                values = distribute_tensor(values, mesh, [Shard(0)], src_data_rank=None)
            replaced[parameter] = nn.Parameter(values, parameter.requires_grad)
        set_unseen(part, name, replaced[parameter])
    shared.clear()
    replaced.clear()
    yield
    for part, name, parameter in list(_places(model)):
        if parameter not in replaced:
            values = parameter.detach()
            values = values.full_tensor() if isinstance(values, DTensor) else values
            replaced[parameter] = nn.Parameter(values, parameter.requires_grad)
            known.convert_to_zero_parameters([replaced[parameter]])
        set_unseen(part, name, replaced[parameter])
    hold_whole(model)
    coordinator = known._z3_optimizer.parameter_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():  # it expects the parameters from before
        coordinator._invalidate_trace()


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Where parameters are: module, name, parameter."""
    for part in model.modules():
        yield from ((part, name, p) for name, p in part._parameters.items() if p is not None)


def load_whole() -> None:
    """Let transformers load models whole: once a trainer is made for ZeRO-3, each process would load a part."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def has_engine(accelerator: Any) -> bool:
    """Whether a training under way is one in DeepSpeed."""
    return getattr(accelerator, "deepspeed_engine_wrapped", None) is not None


def renew_engine(accelerator: Any, model: nn.Module, optimizer: Any) -> Any:
    """Let the engine of a training know the parameters that the model has now; it stays the object that it is.

    Args:
        optimizer: a new one, for these parameters.

    Returns:
        The optimizer as accelerate wraps it.
    """
    engine = accelerator.deepspeed_engine_wrapped.engine
    engine.destroy()
    _forget_engine(model)
    accelerator.deepspeed_engine_wrapped = None
    accelerator._models.remove(engine)
    fresh, prepared = accelerator.prepare(model, optimizer)
    # the training loop holds the old engine, and the model's hooks the new one: both have the same state from here on
    object.__setattr__(engine, "__dict__", fresh.__dict__)
    gc.collect()  # what the old one held lies in cycles
    return prepared


def _forget_engine(model: nn.Module) -> None:
    """Take off the modules what ZeRO-3 leaves on them when it is destroyed: an engine that comes after would take its
    functions for its own, and the old one's parameters would stay."""
    for module in model.modules():
        for name in _LEFT_ON_MODULES:
            vars(module).pop(name, None)
        module._parameters = dict(module._parameters)


_LEFT_ON_MODULES = (
    "pre_bwd_fn",
    "post_bwd_fn",
    "applied_pre_backward_ref_cnt",
    "ds_grads_remaining",
    "ds_recompute_parameters",
    "ds_inflight_param_registry",
    "ds_external_parameters",
    "all_parameters",
    "_external_params",
    "_original_parameters",
)


def _is_there(parameter: Any) -> bool:
    return parameter.ds_status.name == "AVAILABLE"
