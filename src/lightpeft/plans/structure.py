"""Prunable structure of transformer blocks and PEFT modules, as plain data without tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lightpeft.errors import require

Role = Literal["encoder", "decoder", "cross"]
"""Role of a stack of blocks in a model with several stacks; "cross" is the cross-attention of the decoder."""

SLOTS = ("q", "k", "v", "kv", "qkv", "o", "ffn_in", "ffn_gate", "ffn_gate_in", "ffn_out")
"""The projections of a block, in the order they are used; "kv" (head by head), "qkv" and "ffn_gate_in" (gate first) are
fused modules."""

KEY_VALUE_SLOTS = ("k", "v", "kv")
"""Projections whose rows belong to KV heads alone."""

MaskedUnit = Literal["heads", "neurons", "experts", "expert_neurons"]
"""Kinds of units that have masks: query heads, neurons of an FFN, routed experts, and neurons of routed experts."""
MASKED: tuple[MaskedUnit, ...] = get_args(MaskedUnit)
"""Kinds of masked units in the order of the fields of `BlockSpec` and `BlockPlan` with these names."""

Quantity = Literal["heads", "kv_heads", "heads_per_kv", "width"]
"""Quantities that an attribute of an attention module may hold: counts of heads, and their channels together."""

OUTPUT_SLOTS = ("o", "ffn_out")
"""Projections that are cut along their inputs; all others are cut along their outputs."""

FFN_SLOTS = ("ffn_in", "ffn_gate", "ffn_gate_in", "ffn_out")
"""Projections of the FFN, whose units are neurons; those of all others are heads."""


def role_named(name: str) -> Role | None:
    """Return the role with this name; None: there is no such role."""
    return next((role for role in get_args(Role) if role == name), None)


@dataclass(frozen=True)
class BlockSpec:
    """One attention with the FFN that follows it; module names are relative to the transformers model.

    Cross-attention is a block of its own without an FFN (`neurons` 0).
    """

    index: int
    attention: str
    """Name of the module whose forward computes attention and which holds the head counts."""
    projections: dict[str, str]
    """Slot ("q" ... "ffn_out", see `SLOTS`) -> module name; only those that the block has."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads: equal to `heads`, or fewer under grouped-query attention."""
    head_dim: int
    """Channels of one head in the input of `o`, and in all other projections that `head_sizes` does not list."""
    neurons: int
    """FFN intermediate channels; 0 without an FFN."""
    head_parameters: int
    """Parameters of one query head (rows of q with their bias, columns of o)."""
    kv_parameters: int
    """Parameters of one KV head (rows of k and v with their bias)."""
    neuron_parameters: int
    """Parameters of one neuron."""
    head_sizes: dict[str, int] = field(default_factory=dict)
    """Slot -> rows of one head in it, where these differ from `head_dim`."""
    rest_parameters: int = 0
    """Parameters that are removed only with all heads: norms of queries and keys, rows before a norm over all heads,
    and projections of latents that all heads read."""
    fixed_parameters: int = 0
    """Parameters that no plan removes: norms and the biases of output projections."""
    experts: int = 0
    """Number of routed experts; 0 without. A shared expert, which all tokens pass, counts as an FFN."""
    expert_neurons: int = 0
    """Number of intermediate channels of all routed experts together: expert 0's, then expert 1's."""
    experts_per_token: int = 0
    """Number of experts that each token is routed to."""
    fewest_experts: int = 0
    """Minimum number of experts that the router needs; 0: `experts_per_token`."""
    expert_groups: int = 1
    """Number of groups of consecutive experts, among which the router chooses first; no plan removes a group."""
    expert_parameters: int = 0
    """Parameters of one routed expert, its neurons and its row of the router included."""
    expert_neuron_parameters: int = 0
    """Parameters of one neuron of one expert."""
    expert_modules: dict[str, str] = field(default_factory=dict)
    """"router" and "experts" -> name of the module; empty without experts."""
    label: str = ""
    """Name of the block in tables: its layer, in encoder-decoders with the stack ("encoder 0", "cross 3")."""
    role: Role | None = None
    """Role of the block's stack; None where the model has one stack."""
    interleaved: bool = False
    """True: fused qkv rows come KV group by KV group (query heads, key, value); False: all q, then all k, all v."""
    activation: str | None = None
    """Name of the FFN's activation in transformers' `ACT2FN`, if known."""
    head_attributes: dict[str, Quantity] = field(default_factory=dict)
    """Attribute of the attention module -> the quantity it holds."""
    wide_norms: dict[str, str] = field(default_factory=dict)
    """"q" or "k" -> name of the norm over all its heads together, before which its rows cannot be cut."""
    position_bias: str | None = None
    """Name of the table [buckets, heads] of relative position biases that all blocks of the stack share."""
    shared_arguments: tuple[str, ...] = ()
    """Arguments with one entry per head that dense blocks pass on to the next; pruned blocks compute their own."""
    per_head_arguments: dict[str, int] = field(default_factory=dict)
    """Argument of attention -> its dimension with one entry per query head; the entries of kept heads stay."""
    head_tensors: tuple[str, ...] = ()
    """Parameters of the attention module with one entry per query head, [heads]; the entries of kept heads stay."""
    attention_outputs: int = 2
    """Length of the tuple that attention returns."""

    def __post_init__(self) -> None:
        for name in ("shared_arguments", "head_tensors"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads if self.kv_heads else 1

    @property
    def expert_width(self) -> int:
        """Intermediate channels of one routed expert."""
        return self.expert_neurons // self.experts if self.experts else 0

    @property
    def needed_experts(self) -> int:
        """Minimum number of routed experts to keep."""
        return max(self.fewest_experts, self.experts_per_token)

    def needs_experts(self) -> str:
        """Return the reason for the minimum number of experts, as the end of a sentence."""
        each, groups = f"each token is routed to {self.experts_per_token}", self.expert_groups
        if self.needed_experts == self.experts_per_token:
            return each
        return f"{each}, for which its router needs {self.needed_experts} in {groups} equal group{'s' * (groups > 1)}"

    def structure(self) -> tuple[Any, ...]:
        """Return all values that determine how the block is cut; equal structures can exchange plans."""
        sizes = (self.heads, self.kv_heads, self.head_dim, self.head_sizes, self.neurons)
        by_head = (self.wide_norms, self.position_bias, self.per_head_arguments, self.head_tensors)
        routed = (self.experts, self.expert_neurons, self.experts_per_token, self.needed_experts, self.expert_groups)
        return self.projections, sizes, self.interleaved, *by_head, *routed, self.expert_modules

    def cut_slots(self) -> list[str]:
        """Return the slots of the block that pruning cuts."""
        return [slot for slot in self.projections if slot not in self.wide_norms]


@dataclass(frozen=True)
class SiteSpec:
    """One place that holds a PEFT module; `block` and `slot` are None outside the prunable structure."""

    name: str
    """Module name relative to the transformers model; in routed experts that of the parameter."""
    rank: int
    block: int | None
    slot: str | None


_MOST_COUNTED = 2**40
"""Upper bound of every count of a block, parameters included."""


def check_specs(blocks: Sequence[BlockSpec], sites: Sequence[SiteSpec]) -> None:
    """Check that the counts of specs that were read from a file are possible for a dense model.

    Raises:
        LightPeftError: a count is not.
    """
    for part in (*blocks, *sites):
        for name, value in vars(part).items():
            possible = type(value) is not int or 0 <= value < _MOST_COUNTED
            require(possible, f"{type(part).__name__} {getattr(part, 'label', '')} has an invalid {name}: {value}")
    for spec in blocks:
        grouped = spec.heads % spec.kv_heads == 0 if spec.kv_heads else not spec.heads
        place = f"block {spec.label or spec.index}"
        require(grouped, f"{place} cannot share {spec.kv_heads} KV heads among {spec.heads} heads")
        even = spec.needed_experts <= spec.experts and spec.expert_neurons == spec.experts * spec.expert_width
        even = even and spec.expert_groups > 0 and spec.experts % spec.expert_groups == 0
        require(even, f"{place} has invalid counts of experts")
