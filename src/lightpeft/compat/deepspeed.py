"""DeepSpeed: what it holds of a model and of an optimizer, taken out whole, and put in again."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

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


class WholeStates:
    """Stands in for DeepSpeed's optimizer where its state is saved or loaded: as one process would have it, whole.

    Made, and its states loaded, in all processes at once.
    """

    def __init__(self, optimizer: Any, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        """
        Args:
            optimizer: as accelerate wraps it.
            groups: the parameters of its groups, as it was made with them.
        """
        self._zero = optimizer.optimizer
        self._parameters = [parameter for group in groups for parameter in group]
        self._sizes = [len(group) for group in groups]
        self._saved = self._gather()

    def state_dict(self) -> dict[str, Any]:
        """As of the optimizer that DeepSpeed was given."""
        return self._saved

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, of any number of processes."""
        for group, values in zip(self._settings, saved["param_groups"], strict=True):
            group.update({name: value for name, value in values.items() if name != "params"})
        if not saved["state"]:
            return
        first = next(iter(saved["state"].values()))
        for flat in self._flat:
            self._base.state[flat] = {
                name: torch.zeros_like(flat) if _is_of_parameter(value) else _copied(value)
                for name, value in first.items()
                if name != _IN_FLOAT32
            }
        self._link()
        for index, parameter in enumerate(self._parameters):
            for name, value in saved["state"][index].items():
                if _is_of_parameter(value):
                    self._put(parameter, name, value)

    def of_schedule(self, schedule: Any) -> WholeSchedule:
        """What stands in for a scheduler of the optimizer."""
        return WholeSchedule(schedule, self._known)

    @property
    def _base(self) -> Any:
        return self._zero.optimizer

    @property
    def _known(self) -> list[bool]:
        """Of each group, whether DeepSpeed has it: ZeRO-3 forgets those without parameters."""
        all_known = len(self._base.param_groups) == len(self._sizes)
        return [all_known or size > 0 for size in self._sizes]

    @property
    def _settings(self) -> list[dict[str, Any]]:
        """Of each group; those that are forgotten get a copy of another's."""
        groups = iter(self._base.param_groups)
        return [next(groups) if known else dict(self._base.param_groups[0]) for known in self._known]

    @property
    def _flat(self) -> list[Tensor]:
        """What the states in this process are of: its part of all parameters of a group, in one row."""
        of_zero2 = getattr(self._zero, "single_partition_of_fp32_groups", None)
        return self._zero.fp32_partitioned_groups_flat if of_zero2 is None else of_zero2

    def _link(self) -> None:
        """Let ZeRO-2 know where in the rows the states of each parameter lie: by itself it knows of the first group."""
        if hasattr(self._zero, "_lazy_init_hp_params_optimizer_state"):
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _gather(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        def whole(parameter: Any, name: str) -> Tensor:
            values = safe_get_full_optimizer_state(parameter, name) if name else safe_get_full_fp32_param(parameter)
            return values.view(logical_shape(parameter)).cpu()

        state: dict[int, dict[str, Any]] = {}
        known = self._base.state.get(self._flat[0], {})
        if known:
            self._link()
        for index, parameter in enumerate(self._parameters if known else ()):
            state[index] = {
                name: whole(parameter, name) if _is_of_parameter(value) else _copied(value)
                for name, value in known.items()
            }
            if parameter.dtype != torch.float32:
                state[index][_IN_FLOAT32] = whole(parameter, "")
        groups, begun = [], 0
        for group, size in zip(self._settings, self._sizes, strict=True):
            settings = {name: value for name, value in group.items() if name != "params"}
            groups.append({**settings, "params": list(range(begun, begun + size))})
            begun += size
        return {"state": state, "param_groups": groups}

    def _put(self, parameter: Any, name: str, value: Tensor) -> None:
        key = None if name == _IN_FLOAT32 else name
        if in_zero3(parameter):
            part, _ = self._zero._get_fp32_opt_state_partition(parameter, False, key)
            begun = len(part) * torch.distributed.get_rank()
            own = value.flatten()[begun : begun + len(part)]  # that of the last process may end in padding
            part[: len(own)].copy_(own)
        else:
            parameter.set_full_hp_param(value.to(parameter.device), key)


class WholeSchedule:
    """Stands in for a scheduler where its state is saved or loaded: of every group that one process has."""

    def __init__(self, schedule: Any, known: Sequence[bool]) -> None:
        """
        Args:
            schedule: made for DeepSpeed's optimizer.
            known: of each group, whether that has it.
        """
        self._schedule, self._known = schedule, known

    def state_dict(self) -> dict[str, Any]:
        """As of a scheduler of the optimizer that DeepSpeed was given."""
        return {name: self._with_all(value) for name, value in self._schedule.state_dict().items()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._schedule.load_state_dict({name: self._with_known(value) for name, value in saved.items()})

    def _with_all(self, value: Any) -> Any:
        if not isinstance(value, list) or len(value) != sum(self._known):
            return value
        there = iter(value)
        return [next(there) if known else value[0] for known in self._known]

    def _with_known(self, value: Any) -> Any:
        if not isinstance(value, list) or len(value) != len(self._known):
            return value
        return [entry for entry, known in zip(value, self._known, strict=True) if known]


_IN_FLOAT32 = "in_float32"
"""Name among the states for a parameter that is kept in half precision, as DeepSpeed's optimizer knows it."""


def _is_there(parameter: Any) -> bool:
    return parameter.ds_status.name == "AVAILABLE"


def _is_of_parameter(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
