"""Assignment of a projection's channels to units, for separate and for fused projections.

A projection is a row of segments along the dimension that pruning cuts; each segment belongs to one query head, KV head
or neuron. All code that depends on the memory layout of heads (cutting, counting, weight norms) reads the segments.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightpeft.plans.block_plan import BlockPlan
from lightpeft.plans.structure import FFN_SLOTS, KEY_VALUE_SLOTS, OUTPUT_SLOTS, BlockSpec

Kind = Literal["heads", "kv_heads", "neurons"]
Segment = tuple[Kind, int]
"""Kind and index of the unit that a run of channels belongs to."""


def cut_dim(slot: str) -> int:
    """Return the dimension of an [out, in] weight that pruning cuts: 0 (outputs) or 1 (inputs)."""
    return 1 if slot in OUTPUT_SLOTS else 0


def segments(spec: BlockSpec, slot: str) -> list[Segment]:
    """Return the units of a projection along its cut dimension, in the order of its channels."""
    queries: list[Segment] = [("heads", head) for head in range(spec.heads)]
    groups: list[Segment] = [("kv_heads", head) for head in range(spec.kv_heads)]
    neurons: list[Segment] = [("neurons", neuron) for neuron in range(spec.neurons)]
    if slot == "qkv" and spec.interleaved:
        size = spec.heads_per_kv
        return [s for g, group in enumerate(groups) for s in (*queries[g * size : (g + 1) * size], group, group)]
    if slot in KEY_VALUE_SLOTS:
        return groups
    plain = {"q": queries, "o": queries, "qkv": queries + groups + groups}
    if slot in plain:
        return plain[slot]
    return neurons + neurons if slot == "ffn_gate_in" else neurons


def segment_size(spec: BlockSpec, slot: str) -> int:
    """Return the number of channels of a segment: those of one head in this projection, or 1 for neurons."""
    return 1 if slot in FFN_SLOTS else spec.head_sizes.get(slot, spec.head_dim)


def width(spec: BlockSpec, slot: str) -> int:
    """Return the number of channels of a dense projection along its cut dimension."""
    return len(segments(spec, slot)) * segment_size(spec, slot)


def kept_channels(spec: BlockSpec, kept: BlockPlan, slot: str) -> Tensor | None:
    """Return the channels of a projection to keep, ascending, int64; None: all of them."""
    if slot in spec.wide_norms or keeps_all(spec, kept, slot):
        return None
    return head_channels(spec, kept, slot)


def head_channels(spec: BlockSpec, kept: BlockPlan, slot: str) -> Tensor:
    """Return the channels of the units to keep, ascending, int64; rows before a norm over all heads count as well."""
    units = {"heads": set(kept.heads), "kv_heads": set(kept.kv_heads), "neurons": set(kept.neurons)}
    size = segment_size(spec, slot)
    stay = [index for index, (kind, unit) in enumerate(segments(spec, slot)) if unit in units[kind]]
    return (torch.tensor(stay, dtype=torch.long).unsqueeze(1) * size + torch.arange(size)).flatten()


def kept_experts(spec: BlockSpec, kept: BlockPlan) -> tuple[Tensor, Tensor]:
    """Return the experts to keep, [kept], and the channels of each to keep, [kept, width]; ascending, int64."""
    channels = torch.tensor(kept.expert_neurons, dtype=torch.long) % max(spec.expert_width, 1)
    return torch.tensor(kept.experts, dtype=torch.long), channels.view(len(kept.experts), kept.expert_width)


def keeps_all(spec: BlockSpec, kept: BlockPlan, slot: str) -> bool:
    """Return whether the plan keeps all channels of a projection."""
    if slot in FFN_SLOTS:
        return len(kept.neurons) == spec.neurons
    if slot in KEY_VALUE_SLOTS:
        return len(kept.kv_heads) == spec.kv_heads
    return len(kept.heads) == spec.heads


def squared_norms(spec: BlockSpec, slot: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sum up the squares of a weight by query head (with its KV group's rows) and by neuron.

    Args:
        weight: [out, in] of the dense projection.

    Returns:
        [heads] and [neurons], float32.
    """
    squares = weight.float().square().sum(1 - cut_dim(slot))
    runs = squares.view(-1, segment_size(spec, slot)).sum(1)
    sums = {
        "heads": runs.new_zeros(spec.heads),
        "kv_heads": runs.new_zeros(spec.kv_heads),
        "neurons": runs.new_zeros(spec.neurons),
    }
    order = segments(spec, slot)
    for kind, total in sums.items():
        places = [(index, unit) for index, (owner, unit) in enumerate(order) if owner == kind]
        if places:
            index, unit = torch.tensor(places, device=runs.device).T
            total.index_add_(0, unit, runs[index])
    return sums["heads"] + sums["kv_heads"].repeat_interleave(spec.heads_per_kv), sums["neurons"]
