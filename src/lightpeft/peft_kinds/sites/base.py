"""What every PEFT kind has to say of its modules, whatever they compute."""

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
from lightpeft.plans.layout import cut_dim, kept_channels, width
from lightpeft.plans.records import BlockPlan
from lightpeft.plans.structure import BlockSpec, SiteSpec

Report = Callable[[Tensor, Tensor, float], None]
"""Called at every forward pass with what a module adds (up to a factor, which comes third) and what that is measured
against, both [..., width]."""
Tensors = dict[str, Tensor]
"""A module's tensors as PEFT saves them, by what follows the layer's name."""


@dataclass(frozen=True)
class Site(ABC):
    """One live PEFT module on a linear layer of a prunable block. A PEFT kind is one subclass."""

    spec: SiteSpec
    layer: Any
    """PEFT's module, with the frozen layer inside."""
    adapter: str

    peft_type: ClassVar[PeftType]
    layer_type: ClassVar[type]

    # -- the kind ------------------------------------------------------------------------------------------------

    @classmethod
    def matches(cls, config: PeftConfig) -> bool:
        """Whether a PEFT configuration makes modules of this kind."""
        return config.peft_type == cls.peft_type

    @classmethod  # noqa: B027 (most kinds have nothing to refuse)
    def check(cls, config: PeftConfig) -> None:
        """Refuse variants of the kind that cannot be pruned correctly.

        Raises:
            LightPeftError: naming the variant.
        """

    @classmethod
    @abstractmethod
    def rank_of(cls, layer: Any, adapter: str) -> int:
        """Ranks of a module's adapter; 0 if the module does not have it."""

    @classmethod
    @abstractmethod
    def refresh(cls, config: Any, layers: dict[str, Any], adapter: str) -> None:
        """Make the PEFT configuration describe exactly these modules (name -> module) and their sizes."""

    @classmethod  # noqa: B027 (most kinds say as much in any form)
    def simplify(cls, config: Any) -> None:
        """Say in one number, where that is possible, what `refresh` says module by module."""

    @classmethod
    def needs_base(cls, config: Any) -> bool:
        """Whether `unfitted` takes weights of the base."""
        return False

    # -- one module ----------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def down(self) -> nn.Parameter | None:
        """Weights into the ranks, [rank, in]; None where there is nothing to rank."""

    @property
    @abstractmethod
    def up(self) -> nn.Parameter | None:
        """Weights out of the ranks, [out, rank]; None where there is nothing to rank."""

    @abstractmethod
    def observe(self, report: Report, counting: Callable[[], bool]) -> list[RemovableHandle]:
        """Call `report` at every forward pass for which `counting()` holds."""

    def fit(self, spec: BlockSpec, kept: BlockPlan) -> None:
        """Cut the module to what stays of its block; what is frozen is still dense."""
        slot: str = self.spec.slot  # type: ignore[assignment]
        index = kept_channels(spec, kept, slot)
        if index is not None:
            self.cut(index.to(self.device), cut_dim(slot))

    def unfitted(self, learned: Tensors, spec: BlockSpec, kept: BlockPlan) -> Tensors:
        """The inverse of `fit`; arguments and errors as of `expanded_to_dense`."""
        slot: str = self.spec.slot  # type: ignore[assignment]
        index = kept_channels(spec, kept, slot)
        return self.expanded_to_dense(
            learned, torch.arange(width(spec, slot)) if index is None else index, cut_dim(slot)
        )

    @abstractmethod
    def cut(self, index: Tensor, dim: int) -> None:
        """Keep these output features (`dim` 0) or input features (`dim` 1) of the frozen layer's PEFT weights."""

    @abstractmethod
    def expanded_to_dense(self, learned: Tensors, index: Tensor, dim: int) -> Tensors:
        """The inverse of `cut`: what a module of a cut model has learned, for this one, on the dense layer.

        Channels that the cut layer does not have compute as in the base.

        Args:
            learned: of the cut layer's module, on the CPU.
            index: output features (`dim` 0) or input features (`dim` 1) of the dense layer that the cut one has.

        Raises:
            LightPeftError: that takes weights of the base, and this layer has none.
        """

    @abstractmethod
    def keep_ranks(self, index: Tensor) -> None:
        """Keep these ranks; the module computes as if the others were zero."""

    @property
    def base(self) -> nn.Module:
        """The frozen layer."""
        return self.layer.get_base_layer()

    @property
    def device(self) -> torch.device:
        """Where the module computes."""
        return next(self.layer.parameters()).device


def peft_parts(model: nn.Module) -> set[nn.Module]:
    """The modules that PEFT has put in, such as the dropout in front of LoRA's A."""
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    parts = [part for layer in layers for name, part in layer.named_children() if name != "base_layer"]
    return {module for part in parts for module in part.modules()}


def observe_pair(
    base: nn.Module, delta: nn.Module, scaling: float, report: Report, counting: Callable[[], bool]
) -> list[RemovableHandle]:
    """Report the output of `delta`, which is added with the factor `scaling`, against that of `base` before it."""
    outputs: list[Tensor] = []

    def store_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if counting():
            outputs[:] = [output.detach()]

    def compare(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if outputs:
            report(output.detach(), outputs.pop(), scaling)

    return [base.register_forward_hook(store_output), delta.register_forward_hook(compare)]


def spread(tensor: Tensor, index: Tensor, dim: int, size: int, fill: float = 0.0) -> Tensor:
    """A tensor whose entries lie at `index` along `dim`, which is `size` long; elsewhere is `fill`."""
    shape = [*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]]
    return tensor.new_full(shape, fill).index_copy_(dim, index, tensor)
