"""A model family as a declarative record: where the prunable projections of its transformer blocks live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightpeft.plans.structure import FFN_SLOTS, SLOTS, Role

_QUANTITIES = {"heads", "kv_heads", "heads_per_kv", "width"}
_ATTENTION = ({"q", "k", "v", "o"}, {"q", "kv", "o"}, {"qkv", "o"})
_FFN: tuple[set[str], ...] = (
    set(),
    {"ffn_in", "ffn_out"},
    {"ffn_in", "ffn_gate", "ffn_out"},
    {"ffn_gate_in", "ffn_out"},
)


@dataclass(frozen=True)
class Experts:
    """Experts that tokens are routed to: a module with 3-D parameters, and one with a row for each."""

    router: str = "mlp.gate"
    """Relative to a block."""
    experts: str = "mlp.experts"
    """Relative to a block."""
    count_key: str = "num_experts"
    """Config key of how many there are."""
    width_key: str = "moe_intermediate_size"
    """Config key of the intermediate size of each."""


@dataclass(frozen=True)
class Stack:
    """One list of equal blocks: attention and, except for cross-attention, the FFN that follows it."""

    layers: str
    """The list of transformer blocks, relative to the model without its task head."""
    attention: str
    """Relative to a block: the module whose forward runs attention and which holds the head counts."""
    projections: dict[str, str] | Sequence[dict[str, str]]
    """Slot (see `SLOTS`) -> linear layer, relative to a block; or several such tables, of which the first that fits the
    block counts (a family whose FFN may have a gate, or experts in its place)."""
    head_attributes: dict[str, str] = field(default_factory=dict)
    """Attribute of the attention module -> what it holds: "heads", "kv_heads", "heads_per_kv" or "width". What it
    reads from the shared config, such as "config.num_attention_heads", it then reads from a view of its own."""
    heads_key: str = "num_attention_heads"
    """Config key of the number of query heads."""
    head_dim_key: str = "head_dim"
    """Config key of the head dimension; where the config has none, it is the hidden size by the heads."""
    head_sizes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Slot of attention -> config keys that add up to the rows of one head in it, where these are not the head
    dimension, which then is that of the values."""
    width_key: str | tuple[str | None, ...] | None = "intermediate_size"
    """Config key of the FFN width, or one for each table of projections; None where the config does not hold it."""
    experts: Experts | None = None
    """Routed experts, in those blocks that have them."""
    whole: tuple[str, ...] = ()
    """Linear layers, relative to a block, that are no unit's and stay as they are."""
    activation_key: str = "hidden_act"
    """Config key of the FFN's activation."""
    role: Role | None = None
    """What the stack is, where a model has several."""
    label: str = ""
    """The stack's name in tables, where it is not its role."""
    interleaved: bool = False
    """Whether fused qkv rows come KV group by KV group instead of all q, all k, all v."""
    wide_norms: dict[str, str] = field(default_factory=dict)
    """"q" or "k" -> norm, relative to a block, that runs over all its heads together."""
    position_bias: str | None = None
    """In the first block: the table of relative position biases, one column a head, that the whole stack shares."""
    shared_arguments: tuple[str, ...] = ()
    """Arguments of attention with one entry a head that each block hands to the next."""
    per_head_arguments: dict[str, int] = field(default_factory=dict)
    """Argument of attention that something outside the blocks makes -> the dimension of it that has one entry a query
    head, counted from the front or (negative) from the back."""
    head_tensors: tuple[str, ...] = ()
    """Parameters of the attention module with one entry a query head."""
    attention_outputs: int = 2
    """Length of the tuple that attention returns."""

    @property
    def tables(self) -> tuple[dict[str, str], ...]:
        """The tables of projections, in the order they are tried."""
        return (self.projections,) if isinstance(self.projections, dict) else tuple(self.projections)

    def width_key_of(self, projections: Mapping[str, str]) -> str | None:
        """Config key of the FFN width of a block whose projections have these names, or names that end so."""
        if not isinstance(self.width_key, tuple):
            return self.width_key
        name = projections.get("ffn_out", "")
        keys = zip(self.width_key, self.tables, strict=True)
        return next((key for key, table in keys if name.endswith(table["ffn_out"])), None)


@dataclass(frozen=True)
class Family:
    """Names of one family's modules, as transformers spells them."""

    model_type: str
    """`config.model_type` of the family."""
    stacks: tuple[Stack, ...]
    """One stack for encoders and decoders; encoder, decoder and cross-attention for encoder-decoders."""
    positions_after_padding: bool = False
    """Whether position numbers start after the padding index, so that the position table has unused entries."""
    own_bias: str | None = None
    """Attribute of attention that makes it look up position biases itself; those of `Stack.position_bias` alone."""
    head_settings: tuple[str, ...] = ()
    """Generation settings that number cross-attention heads of the dense model."""
    needs: dict[str, Any] = field(default_factory=dict)
    """Config values without which models of this family cannot be pruned."""
    since: tuple[int, int] = (5, 5)
    """The first transformers whose modules have these names."""

    def __post_init__(self) -> None:
        if self.own_bias is None and any(stack.position_bias for stack in self.stacks):
            raise ValueError(
                f"family {self.model_type}: blocks share position biases; own_bias says how one has its own"
            )
        for stack in self.stacks:
            for table in stack.tables:
                attention = set(table) - set(FFN_SLOTS)
                if attention not in _ATTENTION or set(table) - attention not in _FFN:
                    raise ValueError(
                        f"family {self.model_type}: {sorted(table)} are not the projections of a block; give q, k, v "
                        "(or q, kv; or qkv), o and, with an FFN, ffn_in, ffn_gate (or ffn_gate_in), ffn_out; "
                        f"slots: {SLOTS}"
                    )
                if "kv" in table and "kv" not in stack.head_sizes:
                    raise ValueError(f"family {self.model_type}: head_sizes has to say how many rows of kv a head has")
            unknown = set(stack.head_attributes.values()) - _QUANTITIES
            if unknown:
                raise ValueError(f"family {self.model_type}: unknown head attribute quantities {sorted(unknown)}")
