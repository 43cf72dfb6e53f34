"""IA3 modules (Liu et al. 2022): one factor for every output of a layer or, in a feed-forward module, every input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import IA3Config, PeftType
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightpeft.compat.peft import IA3Layer
from lightpeft.models.linears.kinds import slice_parameter
from lightpeft.peft_kinds.sites.base import ReportOutputs, Site, Tensors, spread


class Ia3Site(Site):
    """Access to `l * base(x)`, or `base(l * x)` for modules that PEFT treats as feed-forward; there are no ranks."""

    peft_type = PeftType.IA3
    layer_type = IA3Layer

    @classmethod
    def rank_of(cls, layer: IA3Layer, adapter: str) -> int:
        return int(adapter in layer.ia3_l)

    @classmethod
    def refresh(cls, config: IA3Config, layers: dict[str, IA3Layer], adapter: str) -> None:
        config.feedforward_modules = sorted(name for name, layer in layers.items() if layer.is_feedforward)

    @property
    def down(self) -> None:
        """None, because IA3 has no ranks."""

    @property
    def up(self) -> None:
        """None, because IA3 has no ranks."""

    @property
    def factors(self) -> nn.Parameter:
        """The factors l, [out, 1], or [1, in] in a feed-forward module."""
        return self.layer.ia3_l[self.adapter]

    def observe(self, report: ReportOutputs, counting: Callable[[], bool]) -> list[RemovableHandle]:
        """Hook the module to report the change by the factors, and the states that they scale."""

        def compare(states: Tensor) -> None:
            if counting():
                states = states.detach()
                report((self.factors.detach().flatten() - 1) * states, states, 1.0)

        def see_input(module: nn.Module, args: tuple[Any, ...]) -> None:
            compare(args[0])

        def see_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            compare(output)

        if self.layer.is_feedforward:
            return [self.layer.register_forward_pre_hook(see_input)]
        return [self.base.register_forward_hook(see_output)]

    def cut(self, index: Tensor, dim: int) -> None:
        if dim == int(self.layer.is_feedforward):
            self.layer.ia3_l[self.adapter] = slice_parameter(self.factors, index, dim)
        if dim == 0:
            self.layer.out_features = len(index)
        else:
            self.layer.in_features = len(index)

    def keep_ranks(self, index: Tensor) -> None:
        """Do nothing, because IA3 has no ranks."""

    def expanded_to_dense(self, learned: Tensors, index: Tensor, dim: int) -> Tensors:
        """Expand to the dense layer: factors of restored channels are one."""
        if dim != int(self.layer.is_feedforward):
            return learned
        return {"ia3_l": spread(learned["ia3_l"], index, dim, self.factors.shape[dim], fill=1.0)}
