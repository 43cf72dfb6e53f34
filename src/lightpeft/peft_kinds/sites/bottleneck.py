"""Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2021); their ranks are bottleneck units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightpeft.errors import require
from lightpeft.models.linears.linear_kinds import slice_linear
from lightpeft.peft_kinds.bottleneck import Bottleneck, BottleneckConfig, BottleneckLayer
from lightpeft.peft_kinds.bottleneck.registration import BOTTLENECK
from lightpeft.peft_kinds.sites.base import ReportOutputs, Site, Tensors
from lightpeft.plans.structure import OUTPUT_SLOTS


@dataclass(frozen=True)
class BottleneckSite(Site):
    """Access to `y + scaling * up(f(down(y)))` for the frozen layer's output y."""

    peft_type: ClassVar[Any] = BOTTLENECK
    layer_type = BottleneckLayer

    def __post_init__(self) -> None:
        name = self.spec.name
        require(
            self.spec.slot in OUTPUT_SLOTS,
            f"the adapter on {name} would mix heads or neurons that pruning removes; "
            "put adapters on attention-output and FFN-output projections (placement houlsby or pfeiffer)",
        )

    @classmethod
    def rank_of(cls, layer: BottleneckLayer, adapter: str) -> int:
        return layer.size.get(adapter, 0)

    @classmethod
    def refresh(cls, config: BottleneckConfig, layers: dict[str, BottleneckLayer], adapter: str) -> None:
        sizes = {name: layer.size[adapter] for name, layer in layers.items()}
        config.size_pattern = {name: size for name, size in sizes.items() if size != config.size}

    @property
    def branch(self) -> Bottleneck:
        """Layers of the adapter."""
        return self.layer.bottleneck_adapters[self.adapter]

    @property
    def down(self) -> nn.Parameter:
        """Weight of the down projection, [size, width of the adapter's input]."""
        return cast(nn.Parameter, self.branch.down.weight)

    @property
    def up(self) -> nn.Parameter:
        """Weight of the up projection, [width, size]."""
        return cast(nn.Parameter, self.branch.up.weight)

    def observe(self, report: ReportOutputs, counting: Callable[[], bool]) -> list[RemovableHandle]:
        """Hook the adapter to report its output and its input (Light-PEFT, module importance)."""

        def compare(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if counting():
                report(output.detach(), args[0].detach(), 1.0)

        return [self.branch.register_forward_hook(compare)]

    def cut(self, index: Tensor, dim: int) -> None:
        """Do nothing: the adapter sits behind the projection, on the hidden width, which is never pruned."""

    def keep_ranks(self, index: Tensor) -> None:
        slice_linear(self.branch.down, index, dim=0)
        slice_linear(self.branch.up, index, dim=1)
        self.layer.size[self.adapter] = len(index)

    def expanded_to_dense(self, learned: Tensors, index: Tensor, dim: int) -> Tensors:
        """Return the tensors unchanged, because the adapter sits on the hidden width, which is never pruned."""
        return learned
