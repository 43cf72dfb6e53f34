"""States of DeepSpeed's optimizer, which each process has a part of in one long row, as one process would have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightpeft.compat.deepspeed import in_zero3, logical_shape


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


def _is_of_parameter(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
