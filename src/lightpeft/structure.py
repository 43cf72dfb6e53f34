"""What can be pruned: one transformer block's structure and one PEFT site, as plain data without tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

SLOTS = ("q", "k", "v", "o", "ffn_in", "ffn_gate", "ffn_out")
"""The projections of a block, in the order they are used."""


@dataclass(frozen=True)
class BlockSpec:
    """One transformer block's prunable structure; module names are relative to the transformers model."""

    index: int
    attention: str
    """Name of the module whose forward runs attention and which holds the head counts."""
    projections: dict[str, str]
    """Slot ("q" ... "ffn_out", see `SLOTS`) -> module name; "ffn_gate" is absent without a gate."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads: equal to `heads`, or fewer under grouped-query attention."""
    head_dim: int
    neurons: int
    """FFN intermediate channels."""
    head_parameters: int
    """Parameters that one query head takes with it (rows of q with their bias, columns of o)."""
    kv_parameters: int
    """Parameters that one KV head takes with it (rows of k and v with their bias)."""
    neuron_parameters: int
    """Parameters that one neuron takes with it."""
    head_attributes: dict[str, str] = field(default_factory=dict)
    """Attribute of the attention module -> the quantity it holds: "heads", "kv_heads", "heads_per_kv", "width"."""

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class SiteSpec:
    """One place that holds a PEFT module; `block` and `slot` are None outside the prunable structure."""

    name: str
    """Module name relative to the transformers model."""
    rank: int
    block: int | None
    slot: str | None
