"""A model family as a declarative record: where the prunable projections of one transformer block live."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightpeft.structure import SLOTS


@dataclass(frozen=True)
class Family:
    """Names of one family's modules, as transformers spells them."""

    model_type: str
    """`config.model_type` of the family."""
    layers: str
    """The list of transformer blocks, relative to the model without its task head."""
    attention: str
    """Relative to a block: the module whose forward runs attention and which holds the head counts."""
    projections: dict[str, str]
    """Slot (see `SLOTS`) -> linear layer, relative to a block; leave "ffn_gate" out where there is no gate."""
    head_attributes: dict[str, str] = field(default_factory=dict)
    """Attribute of the attention module -> what it holds: "heads", "kv_heads", "heads_per_kv" or "width"."""
    width_key: str = "intermediate_size"
    """Config key of the FFN width."""
    positions_after_padding: bool = False
    """Whether position numbers start after the padding index, so that the position table has unused entries."""

    def __post_init__(self) -> None:
        required = set(SLOTS) - {"ffn_gate"}
        if not required <= set(self.projections) <= set(SLOTS):
            raise ValueError(f"family {self.model_type}: projections must name {sorted(required)} and at most ffn_gate")
        unknown = set(self.head_attributes.values()) - {"heads", "kv_heads", "heads_per_kv", "width"}
        if unknown:
            raise ValueError(f"family {self.model_type}: unknown head attribute quantities {sorted(unknown)}")
