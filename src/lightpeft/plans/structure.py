"""What can be pruned: one transformer block's structure and one PEFT site, as plain data without tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Role = Literal["encoder", "decoder", "cross"]
"""What a stack of blocks is in a model that has several; "cross" is the cross-attention of the decoder."""

SLOTS = ("q", "k", "v", "kv", "qkv", "o", "ffn_in", "ffn_gate", "ffn_gate_in", "ffn_out")
"""The projections of a block, in the order they are used; "kv" (head by head), "qkv" and "ffn_gate_in" (gate first) are
fused modules."""

KEY_VALUE_SLOTS = ("k", "v", "kv")
"""Projections whose rows belong to KV heads alone."""

MaskedUnit = Literal["heads", "neurons", "experts", "expert_neurons"]
"""What has a mask each: query heads; neurons of an FFN; routed experts; and the neurons inside these."""
MASKED: tuple[MaskedUnit, ...] = get_args(MaskedUnit)
"""The same, in the order of `BlockSpec` and `BlockPlan`, which count and keep them under these names."""

OUTPUT_SLOTS = ("o", "ffn_out")
"""Projections that are cut along their inputs; all others are cut along their outputs."""

FFN_SLOTS = ("ffn_in", "ffn_gate", "ffn_gate_in", "ffn_out")
"""Projections of the FFN, whose units are neurons; those of all others are heads."""


def role_named(name: str) -> Role | None:
    """The role of that name; None: there is none."""
    return next((role for role in get_args(Role) if role == name), None)


@dataclass(frozen=True)
class BlockSpec:
    """One attention with the FFN that follows it; module names are relative to the transformers model.

    Cross-attention is a block of its own without an FFN (`neurons` 0).
    """

    index: int
    attention: str
    """Name of the module whose forward runs attention and which holds the head counts."""
    projections: dict[str, str]
    """Slot ("q" ... "ffn_out", see `SLOTS`) -> module name; only those that the block has."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads: equal to `heads`, or fewer under grouped-query attention."""
    head_dim: int
    """Channels of one head in the input of `o`; and in its other projections, where `head_sizes` says nothing else."""
    neurons: int
    """FFN intermediate channels; 0 without an FFN."""
    head_parameters: int
    """Parameters that one query head takes with it (rows of q with their bias, columns of o)."""
    kv_parameters: int
    """Parameters that one KV head takes with it (rows of k and v with their bias)."""
    neuron_parameters: int
    """Parameters that one neuron takes with it."""
    head_sizes: dict[str, int] = field(default_factory=dict)
    """Slot -> rows of one head in it, where these are not `head_dim`: queries, or keys with values, of other widths."""
    rest_parameters: int = 0
    """Parameters that go only when all heads go: norms of queries and keys, rows before a norm over all heads, and what
    makes the latents that all heads read."""
    fixed_parameters: int = 0
    """Parameters that no plan removes: norms and the biases of output projections."""
    experts: int = 0
    """Experts that tokens are routed to; 0 without. An expert that they all pass (a shared one) is an FFN."""
    expert_neurons: int = 0
    """Intermediate channels of all routed experts together: expert 0's, then expert 1's."""
    experts_per_token: int = 0
    """Experts that each token is routed to."""
    fewest_experts: int = 0
    """How many experts stay at least, so that the router finds as many as it looks for; 0: `experts_per_token`."""
    expert_groups: int = 1
    """Groups of equally many experts, one after the other, of which the router chooses some first; all stay."""
    expert_parameters: int = 0
    """Parameters that one routed expert takes with it, its neurons and its row of the router included."""
    expert_neuron_parameters: int = 0
    """Parameters that one neuron of one expert takes with it."""
    expert_modules: dict[str, str] = field(default_factory=dict)
    """"router" and "experts" -> name of the module; empty without experts."""
    label: str = ""
    """What people call the block: its layer, in encoder-decoders with the stack ("encoder 0", "cross 3")."""
    role: Role | None = None
    """What the block's stack is; None where the model has one stack."""
    interleaved: bool = False
    """Whether fused qkv rows come KV group by KV group (query heads, key, value); else all q, then all k, all v."""
    activation: str | None = None
    """Name of the FFN's activation in transformers' `ACT2FN`, if known."""
    head_attributes: dict[str, str] = field(default_factory=dict)
    """Attribute of the attention module -> the quantity it holds: "heads", "kv_heads", "heads_per_kv", "width"."""
    wide_norms: dict[str, str] = field(default_factory=dict)
    """"q" or "k" -> name of the norm over all its heads together, before which its rows cannot be cut."""
    position_bias: str | None = None
    """Name of the table [buckets, heads] of relative position biases that all blocks of the stack share."""
    shared_arguments: tuple[str, ...] = ()
    """Arguments with one entry a head that dense blocks hand to the next; after pruning each block makes its own."""
    per_head_arguments: dict[str, int] = field(default_factory=dict)
    """Argument of attention -> the dimension of it that has one entry a query head; the entries of kept heads stay."""
    head_tensors: tuple[str, ...] = ()
    """Parameters of the attention module with one entry a query head, [heads]; the entries of kept heads stay."""
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
        """Routed experts that have to stay."""
        return max(self.fewest_experts, self.experts_per_token)

    def needs_experts(self) -> str:
        """Why so many have to stay, as the end of a sentence."""
        each, groups = f"each token is routed to {self.experts_per_token}", self.expert_groups
        if self.needed_experts == self.experts_per_token:
            return each
        return f"{each}, for which its router needs {self.needed_experts} in {groups} equal group{'s' * (groups > 1)}"

    def structure(self) -> tuple[Any, ...]:
        """All that decides how the block is cut; blocks of one structure can take each other's plans."""
        sizes = (self.heads, self.kv_heads, self.head_dim, self.head_sizes, self.neurons)
        by_head = (self.wide_norms, self.position_bias, self.per_head_arguments, self.head_tensors)
        routed = (self.experts, self.expert_neurons, self.experts_per_token, self.needed_experts, self.expert_groups)
        return self.projections, sizes, self.interleaved, *by_head, *routed, self.expert_modules

    def cut_slots(self) -> list[str]:
        """Slots that the block has and that pruning cuts."""
        return [slot for slot in self.projections if slot not in self.wide_norms]


@dataclass(frozen=True)
class SiteSpec:
    """One place that holds a PEFT module; `block` and `slot` are None outside the prunable structure."""

    name: str
    """Module name relative to the transformers model; in routed experts that of the parameter."""
    rank: int
    block: int | None
    slot: str | None
