"""The units of a block to keep, and the parameters that this removes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightpeft.plans.structure import BlockSpec


@dataclass(frozen=True)
class BlockPlan:
    """Units of one block to keep, as ascending indices into the dense block."""

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    neurons: tuple[int, ...]
    experts: tuple[int, ...] = ()
    expert_neurons: tuple[int, ...] = ()
    """Neurons of all kept experts, equally many of each, numbered over all experts of the dense block."""

    @property
    def expert_width(self) -> int:
        """Intermediate channels of each kept expert."""
        return len(self.expert_neurons) // len(self.experts) if self.experts else 0


def removed_in_block(spec: BlockSpec, kept: BlockPlan) -> int:
    """Count the parameters of a block that are removed when only `kept` is kept."""
    return (
        (spec.heads - len(kept.heads)) * spec.head_parameters
        + (spec.kv_heads - len(kept.kv_heads)) * spec.kv_parameters
        + (spec.neurons - len(kept.neurons)) * spec.neuron_parameters
        + (spec.experts - len(kept.experts)) * spec.expert_parameters
        + len(kept.experts) * (spec.expert_width - kept.expert_width) * spec.expert_neuron_parameters
        + (0 if kept.heads else spec.rest_parameters)
    )


def removed_parameters(parts: Iterable[tuple[BlockSpec, BlockPlan]], left_out: Iterable[BlockSpec]) -> int:
    """Count the parameters that are removed from some blocks, and those of blocks that are dropped whole."""
    return sum(removed_in_block(*part) for part in parts) + sum(map(block_parameters, left_out))


def removable_parameters(spec: BlockSpec) -> int:
    """Count the parameters of a block that pruning can remove."""
    return removed_in_block(spec, BlockPlan((), (), ()))


def block_parameters(spec: BlockSpec) -> int:
    """Count all parameters of a dense block."""
    return removable_parameters(spec) + spec.fixed_parameters
