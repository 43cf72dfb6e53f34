"""Interface of the PEFT kinds: access to one PEFT module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftType
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightpeft.compat.peft import BaseTunerLayer
from lightpeft.plans.block_plan import BlockPlan
from lightpeft.plans.layout import cut_dim, kept_channels, width
from lightpeft.plans.structure import BlockSpec, SiteSpec

ReportOutputs = Callable[[Tensor, Tensor, float], None]
"""Function of a module's addition (up to a factor), the output that it is compared with, both [..., width], and the
factor; called at every forward pass."""
Tensors = dict[str, Tensor]
"""Name -> tensor of a module as PEFT saves them; the names come after the name of the layer."""


@dataclass(frozen=True)
class Site(ABC):
    """One live PEFT module on a linear layer of a prunable block. Each PEFT kind is a subclass."""

    spec: SiteSpec
    layer: Any
    """PEFT's module, which contains the frozen layer."""
    adapter: str
    """Name of the adapter."""

    peft_type: ClassVar[PeftType]
    layer_type: ClassVar[type]
    needs_base: ClassVar[bool] = False
    """True if expanding to the dense base needs its weights, as for DoRA's magnitudes of restored rows."""

    # -- the kind ------------------------------------------------------------------------------------------------

    @classmethod
    def matches(cls, config: PeftConfig) -> bool:
        """Return whether a PEFT configuration makes modules of this kind."""
        return config.peft_type == cls.peft_type

    @classmethod  # noqa: B027 (most kinds have nothing to refuse)
    def check(cls, config: PeftConfig) -> None:
        """Refuse variants of the kind that cannot be pruned correctly.

        Raises:
            LightPeftError: the variant cannot be pruned.
        """

    @classmethod
    @abstractmethod
    def rank_of(cls, layer: Any, adapter: str) -> int:
        """Return the number of ranks of a module's adapter; 0 if the module does not have it."""

    @classmethod
    @abstractmethod
    def refresh(cls, config: Any, layers: dict[str, Any], adapter: str) -> None:
        """Set the PEFT configuration to exactly these modules (name -> module) and their sizes."""

    @classmethod  # noqa: B027 (most kinds say as much in any form)
    def simplify(cls, config: Any) -> None:
        """Replace sizes per module, which `refresh` sets, by a single number where that is possible."""

    # -- one module ----------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def down(self) -> nn.Parameter | None:
        """Weights into the ranks, [rank, in]; None for kinds without ranks."""

    @property
    @abstractmethod
    def up(self) -> nn.Parameter | None:
        """Weights out of the ranks, [out, rank]; None for kinds without ranks."""

    @abstractmethod
    def observe(self, report: ReportOutputs, counting: Callable[[], bool]) -> list[RemovableHandle]:
        """Hook the module so that `report` is called at every forward pass for which `counting()` is true."""

    def fit(self, spec: BlockSpec, kept: BlockPlan) -> None:
        """Cut the module to the kept units of its block, while its frozen layer is still dense."""
        slot: str = self.spec.slot  # type: ignore[assignment]
        index = kept_channels(spec, kept, slot)
        if index is not None:
            self.cut(index.to(self.device), cut_dim(slot))

    def unfitted(self, learned: Tensors, spec: BlockSpec, kept: BlockPlan) -> Tensors:
        """Expand weights of a module that `fit` has cut to the dense layer of this module.

        Args:
            learned: tensors of the cut layer's module, on the CPU.
            spec: structure of the dense block.
            kept: units of the block that the cut model keeps.

        Raises:
            LightPeftError: the kind needs weights of the base, and this layer has none.
        """
        slot: str = self.spec.slot  # type: ignore[assignment]
        index = kept_channels(spec, kept, slot)
        return self.expanded_to_dense(
            learned, torch.arange(width(spec, slot)) if index is None else index, cut_dim(slot)
        )

    @abstractmethod
    def cut(self, index: Tensor, dim: int) -> None:
        """Keep these output features (`dim` 0) or input features (`dim` 1) of the PEFT weights."""

    @abstractmethod
    def expanded_to_dense(self, learned: Tensors, index: Tensor, dim: int) -> Tensors:
        """Expand weights of a module that `cut` has cut to the dense layer of this module.

        Channels that the cut layer does not have compute as in the base.

        Args:
            learned: tensors of the cut layer's module, on the CPU.
            index: output features (`dim` 0) or input features (`dim` 1) of the dense layer that the cut one keeps.

        Raises:
            LightPeftError: the kind needs weights of the base, and this layer has none.
        """

    @abstractmethod
    def keep_ranks(self, index: Tensor) -> None:
        """Keep these ranks; the module then computes as if the others were zero."""

    @property
    def base(self) -> nn.Module:
        """The frozen layer."""
        return self.layer.get_base_layer()

    @property
    def device(self) -> torch.device:
        """Device of the module."""
        return next(self.layer.parameters()).device


def peft_parts(model: nn.Module) -> set[nn.Module]:
    """Return the modules that PEFT has added, such as the dropout in front of LoRA's A."""
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    parts = [part for layer in layers for name, part in layer.named_children() if name != "base_layer"]
    return {module for part in parts for module in part.modules()}


def observe_pair(
    base: nn.Module, delta: nn.Module, scaling: float, report: ReportOutputs, counting: Callable[[], bool]
) -> list[RemovableHandle]:
    """Hook two layers to report the output of `delta`, which is added with the factor `scaling`, and that of `base`."""
    outputs: list[Tensor] = []

    def store_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if counting():
            outputs[:] = [output.detach()]

    def compare(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if outputs:
            report(output.detach(), outputs.pop(), scaling)

    return [base.register_forward_hook(store_output), delta.register_forward_hook(compare)]


def spread(tensor: Tensor, index: Tensor, dim: int, size: int, fill: float = 0.0) -> Tensor:
    """Scatter a tensor to the positions `index` along `dim` of a tensor of length `size`, filled with `fill`."""
    shape = [*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]]
    return tensor.new_full(shape, fill).index_copy_(dim, index, tensor)
