"""From a live transformers model to the `BlockSpec`s of its blocks."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lightpeft.errors import LightPeftError, require
from lightpeft.families.decoders import LLAMA, OPT
from lightpeft.families.encoders import BERT, ROBERTA
from lightpeft.families.spec import Family
from lightpeft.structure import BlockSpec

FAMILIES: dict[str, Family] = {family.model_type: family for family in (BERT, ROBERTA, LLAMA, OPT)}
"""Supported families by `config.model_type`."""

_PRUNED_BEFORE = "a model that was pruned before cannot be pruned again"


def family_of(model_type: str) -> Family:
    """The family of a model type.

    Raises:
        LightPeftError: the family is not supported; the message lists those that are and how to add one.
    """
    if model_type not in FAMILIES:
        raise LightPeftError(
            f'model family "{model_type}" is not supported; supported: {", ".join(sorted(FAMILIES))}. '
            "A family is one declarative entry: see docs/families.md"
        )
    return FAMILIES[model_type]


def block_specs(model: PreTrainedModel) -> list[BlockSpec]:
    """The prunable structure of every block of a transformers model (without PEFT, or with PEFT inside it).

    Raises:
        LightPeftError: unsupported family, cross-attention, quantised weights, or widths that do not fit the config
            (for example a model that was pruned before).
    """
    config = model.config
    family = family_of(config.model_type)
    require(not getattr(config, "add_cross_attention", False), "cross-attention blocks are not supported yet")
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    blocks = base.get_submodule(family.layers)
    return [
        _block_spec(family, index, block, f"{prefix}{family.layers}.{index}", config)
        for index, block in enumerate(blocks)
    ]


def max_positions(config: PretrainedConfig) -> int | None:
    """Tokens that the position table of a supported model has room for; None where nothing limits them."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions and family_of(config.model_type).positions_after_padding:
        return positions - config.pad_token_id - 1
    return positions


def _block_spec(family: Family, index: int, block: nn.Module, path: str, config: object) -> BlockSpec:
    linear = {slot: _linear(block, name, f"{path}.{name}") for slot, name in family.projections.items()}
    heads: int = config.num_attention_heads  # type: ignore[attr-defined]
    kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads  # type: ignore[attr-defined]
    neurons = linear["ffn_out"].in_features
    widths = (linear["q"].out_features, linear["o"].in_features, linear["k"].out_features, neurons)
    expected = (heads * head_dim, heads * head_dim, kv_heads * head_dim, getattr(config, family.width_key))
    require(widths == expected, f"{path}: widths do not match the config; {_PRUNED_BEFORE}")
    return BlockSpec(
        index=index,
        attention=f"{path}.{family.attention}",
        projections={slot: f"{path}.{name}" for slot, name in family.projections.items()},
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        neurons=neurons,
        head_parameters=head_dim * (_row(linear["q"]) + linear["o"].out_features),
        kv_parameters=head_dim * (_row(linear["k"]) + _row(linear["v"])),
        neuron_parameters=sum(_row(linear[s]) for s in ("ffn_in", "ffn_gate") if s in linear)
        + linear["ffn_out"].out_features,
        head_attributes=dict(family.head_attributes),
    )


def _row(linear: nn.Linear) -> int:
    """Parameters of one output feature: a weight row and its bias."""
    return linear.in_features + (linear.bias is not None)


def _linear(block: nn.Module, name: str, path: str) -> nn.Linear:
    """The frozen linear layer at `name`, with a PEFT module around it or without."""
    try:
        module = block.get_submodule(name)
    except AttributeError as error:
        raise LightPeftError(f"there is no {path}; {_PRUNED_BEFORE}") from error
    module = getattr(module, "base_layer", module)
    if type(module) is not nn.Linear:
        raise LightPeftError(
            f"{path} is a {type(module).__module__}.{type(module).__name__}, not a plain torch.nn.Linear; "
            "quantised weights cannot be pruned yet: load the base in float32, bfloat16 or float16"
        )
    return module
