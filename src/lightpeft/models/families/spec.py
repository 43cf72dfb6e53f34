"""Declarative description of a model family: the module names of its transformer blocks' prunable projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from lightpeft.plans.structure import FFN_SLOTS, SLOTS, Quantity, Role

_ATTENTION = ({"q", "k", "v", "o"}, {"q", "kv", "o"}, {"qkv", "o"})
_FFN: tuple[set[str], ...] = (
    set(),
    {"ffn_in", "ffn_out"},
    {"ffn_in", "ffn_gate", "ffn_out"},
    {"ffn_gate_in", "ffn_out"},
)


@dataclass(frozen=True)
class Experts:
    """Names of routed experts: a module with 3-D parameters, and a router with one row for each expert."""

    router: str = "mlp.gate"
    """Name of the router, relative to a block."""
    experts: str = "mlp.experts"
    """Name of the module of experts, relative to a block."""
    count_key: str = "num_experts"
    """Config key of the number of experts."""
    width_key: str = "moe_intermediate_size"
    """Config key of the intermediate size of each expert."""


@dataclass(frozen=True)
class Stack:
    """One list of equal blocks: attention and, except for cross-attention, the FFN that follows it.

    Example:
        stack = Stack(
            layers="encoder.layer",
            attention="attention",
            projections={
                "q": "attention.q",
                "k": "attention.k",
                "v": "attention.v",
                "o": "attention.out",
                "ffn_in": "ffn.in",
                "ffn_out": "ffn.out",
            },
            head_attributes={"num_heads": "heads"},
        )
    """

    layers: str
    """Name of the list of transformer blocks, relative to the model without its task head."""
    attention: str
    """Name, relative to a block, of the module whose forward computes attention and which holds the head counts."""
    projections: dict[str, str] | Sequence[dict[str, str]]
    """Slot (see `SLOTS`) -> linear layer, relative to a block; or several such tables, of which the first that fits a
    block is used (for families whose FFN may have a gate, or experts in its place)."""
    head_attributes: dict[str, Quantity] = field(default_factory=dict)
    """Attribute of the attention module -> its quantity: "heads", "kv_heads", "heads_per_kv" or "width". An attribute
    of the shared config, such as "config.num_attention_heads", is set in a view of the config for the module."""
    heads_key: str = "num_attention_heads"
    """Config key of the number of query heads."""
    head_dim_key: str = "head_dim"
    """Config key of the head dimension; if the config does not have it, it is the hidden size divided by the heads."""
    head_sizes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Slot of attention -> config keys whose sum is the number of rows of one head, where it differs from the head
    dimension, which is then that of the values."""
    width_key: str | tuple[str | None, ...] | None = "intermediate_size"
    """Config key of the FFN width, or one for each table of projections; None where the config does not hold it."""
    experts: Experts | None = None
    """Names of the routed experts, in blocks that have them."""
    whole: tuple[str, ...] = ()
    """Linear layers, relative to a block, that belong to no unit and are not cut."""
    activation_key: str = "hidden_act"
    """Config key of the FFN's activation."""
    role: Role | None = None
    """Role of the stack in a model with several stacks; None: the model has one stack."""
    label: str = ""
    """Name of the stack in tables; empty: its role."""
    interleaved: bool = False
    """True: fused qkv rows come KV group by KV group; False: all q, then all k, all v."""
    wide_norms: dict[str, str] = field(default_factory=dict)
    """"q" or "k" -> norm over all its heads together, relative to a block."""
    position_bias: str | None = None
    """Name in the first block of the table of relative position biases, one column per head, that the stack shares."""
    shared_arguments: tuple[str, ...] = ()
    """Arguments of attention with one entry per head that each block passes on to the next."""
    per_head_arguments: dict[str, int] = field(default_factory=dict)
    """Argument of attention from outside the blocks -> its dimension with one entry per query head, counted from the
    front or (negative) from the back."""
    head_tensors: tuple[str, ...] = ()
    """Parameters of the attention module with one entry per query head."""
    attention_outputs: int = 2
    """Length of the tuple that attention returns."""

    @property
    def tables(self) -> tuple[dict[str, str], ...]:
        """Tables of projections in the order in which they are tried."""
        return (self.projections,) if isinstance(self.projections, dict) else tuple(self.projections)

    def width_key_of(self, projections: Mapping[str, str]) -> str | None:
        """Return the config key of the FFN width of a block with these projections, by the endings of their names."""
        if not isinstance(self.width_key, tuple):
            return self.width_key
        name = projections.get("ffn_out", "")
        keys = zip(self.width_key, self.tables, strict=True)
        return next((key for key, table in keys if name.endswith(table["ffn_out"])), None)


@dataclass(frozen=True)
class Family:
    """Module names of one model family of transformers, for `register_family`.

    Example:
        register_family(Family("my_model", (stack,)))

    Raises:
        ValueError: the projections or attributes of a stack are inconsistent.
    """

    model_type: str
    """`config.model_type` of the family."""
    stacks: tuple[Stack, ...]
    """One stack for encoders and decoders; encoder, decoder and cross-attention for encoder-decoders."""
    positions_after_padding: bool = False
    """True: position ids start after the padding index, so that the position table has unused entries."""
    own_bias: str | None = None
    """Attribute that makes attention look up position biases itself; needed with `Stack.position_bias` only."""
    head_settings: tuple[str, ...] = ()
    """Generation settings with indices of the dense model's cross-attention heads."""
    needs: dict[str, Any] = field(default_factory=dict)
    """Config values that models of this family need to be pruned."""
    since: tuple[int, int] = (5, 5)
    """First version of transformers with these module names."""

    def __post_init__(self) -> None:
        if self.own_bias is None and any(stack.position_bias for stack in self.stacks):
            raise ValueError(f"family {self.model_type}: blocks share position biases; set own_bias")
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
                    raise ValueError(f"family {self.model_type}: kv rows of a head are unknown; set head_sizes")
            unknown = set(stack.head_attributes.values()) - {*get_args(Quantity)}
            if unknown:
                raise ValueError(f"family {self.model_type}: unknown quantities {sorted(unknown)} in head_attributes")
