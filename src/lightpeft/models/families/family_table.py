"""Registry of families, and extraction of `BlockSpec`s from a live transformers model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lightpeft.compat.transformers import ACT2FN
from lightpeft.errors import LightPeftError, require
from lightpeft.models.experts import ExpertLayer
from lightpeft.models.families.decoders import DECODERS
from lightpeft.models.families.encoder_decoders import ENCODER_DECODERS
from lightpeft.models.families.encoders import ENCODERS
from lightpeft.models.families.spec import Experts, Family, Stack
from lightpeft.models.linears.linear_kinds import describe, features, is_linear
from lightpeft.models.unwrap import base_layer
from lightpeft.plans.block_plan import removable_parameters
from lightpeft.plans.layout import Kind, cut_dim, segment_size, segments, width
from lightpeft.plans.structure import KEY_VALUE_SLOTS, BlockSpec

FAMILIES: dict[str, Family] = {family.model_type: family for family in (*ENCODERS, *DECODERS, *ENCODER_DECODERS)}
"""Supported families by `config.model_type`."""

REFUSED: dict[str, str] = {
    "albert": "its layers share one set of weights, so removing a unit from one layer would remove it from all",
    "bloom": "its attention adds the residual and reads ALiBi slopes of all heads",
}
"""Model types that cannot be pruned -> the reason."""

_PRUNED_BEFORE = "a pruned model cannot be pruned again, so give the dense base"


def register_family(family: Family) -> None:
    """Register a model family of your own; it replaces one with the same model type.

    Args:
        family: module names of the family.

    Example:
        stack = Stack(
            layers="layers",
            attention="self_attn",
            projections={"q": "self_attn.q", "k": "self_attn.k", "v": "self_attn.v", "o": "self_attn.o"},
        )
        register_family(Family("my_model", (stack,)))
    """
    FAMILIES[family.model_type] = family


def check_not_refused(model_type: str) -> None:
    """Refuse families that cannot be pruned; unlisted families pass, because they may be discovered.

    Raises:
        LightPeftError: the family cannot be pruned; the message has the reason.
    """
    if model_type in REFUSED:
        raise LightPeftError(f'model family "{model_type}" cannot be pruned: {REFUSED[model_type]}')


def family_of(model_type: str) -> Family:
    """Return the registered family of a model type.

    Raises:
        LightPeftError: the family is not supported; the message has the reason, or lists the supported ones.
    """
    check_not_refused(model_type)
    if model_type not in FAMILIES:
        raise LightPeftError(
            f'model family "{model_type}" is not registered; call lightpeft.ensure_family(model) to discover it, or '
            f"add an entry (docs/reference/families.md); registered families: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    here, first = transformers.__version__, ".".join(map(str, family.since))
    newer = tuple(int(part) for part in here.split(".")[:2]) >= family.since
    require(newer, f'model family "{model_type}" needs transformers {first} or newer, not {here}; upgrade it')
    return family


def block_specs(model: PreTrainedModel, family: Family | None = None) -> list[BlockSpec]:
    """Return the prunable structure of every block of a transformers model, with or without PEFT inside.

    Args:
        model: the transformers model, with or without a task head.
        family: module names of the model; None: the registered family of its model type.

    Raises:
        LightPeftError: the family is not supported, the model has projections that the family does not list (such as
            cross-attention in BERT), layers of an unknown kind, or widths that differ from the config (such as those of
            a pruned model).
    """
    config = model.config
    require(not getattr(model, "light_pruned", False), f"this {type(model).__name__} is pruned; {_PRUNED_BEFORE}")
    family = family or family_of(config.model_type)
    for key, value in family.needs.items():
        given = getattr(config, key, value)
        require(given == value, f"{family.model_type} with {key}={given} cannot be pruned; {key}={value} can")
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    specs: list[BlockSpec] = []
    modules: list[nn.Module] = []
    for stack in family.stacks:
        for layer, block in enumerate(_find_submodule(base, stack.layers) or ()):
            specs.append(_block_spec(stack, len(specs), layer, block, f"{prefix}{stack.layers}", config))
            modules.append(block)
    require(bool(specs), f"this {type(model).__name__} has no {prefix}{family.stacks[0].layers}, as its family should")
    _check_all_listed(model, specs, [f"{prefix}{stack.layers}" for stack in family.stacks], _uncut_endings(family))
    return _with_fixed(specs, modules)


def block_lists(model: PreTrainedModel) -> list[nn.ModuleList]:
    """Return the lists of transformer blocks of a model, pruned or not, one for each stack.

    Raises:
        LightPeftError: the family is not supported.
    """
    base = model.base_model
    lists = [_find_submodule(base, stack.layers) for stack in family_of(model.config.model_type).stacks]
    return list({id(blocks): blocks for blocks in lists if blocks is not None}.values())


def max_positions(config: PretrainedConfig) -> int | None:
    """Return the maximum number of tokens by a model's position table; None: there is no limit."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    family = FAMILIES.get(config.model_type)
    if positions and family is not None and family.positions_after_padding:
        return positions - config.pad_token_id - 1
    return positions


def _block_spec(stack: Stack, index: int, layer: int, block: nn.Module, path: str, config: Any) -> BlockSpec:
    where = f"{path}.{layer}"
    table = _fitting_table(stack, block, where)
    linear = {slot: _find_linear(block, name, f"{where}.{name}") for slot, name in table.items()}
    heads: int = getattr(config, stack.heads_key)
    head_dim: int = getattr(config, stack.head_dim_key, None) or config.hidden_size // heads
    sizes = {slot: sum(getattr(config, key) for key in keys) for slot, keys in stack.head_sizes.items()}
    spec = BlockSpec(
        index=index,
        attention=f"{where}.{stack.attention}",
        projections={slot: f"{where}.{name}" for slot, name in table.items()},
        heads=heads,
        kv_heads=_kv_heads(linear, heads, head_dim, sizes),
        head_dim=head_dim,
        head_sizes=sizes,
        neurons=features(linear["ffn_out"])[1] if "ffn_out" in linear else 0,
        head_parameters=0,
        kv_parameters=0,
        neuron_parameters=0,
        label=f"{stack.label or stack.role or ''} {layer}".strip(),
        role=stack.role,
        interleaved=stack.interleaved,
        activation=_activation(config, stack),
        head_attributes=dict(stack.head_attributes),
        wide_norms={slot: f"{where}.{name}" for slot, name in stack.wide_norms.items()},
        position_bias=f"{path}.0.{stack.position_bias}" if stack.position_bias else None,
        shared_arguments=stack.shared_arguments,
        per_head_arguments=dict(stack.per_head_arguments),
        head_tensors=stack.head_tensors,
        attention_outputs=stack.attention_outputs,
    )
    _check_widths(spec, linear, stack, config, where)
    rest = _rest_parameters(spec, block.get_submodule(stack.attention))
    spec = _with_counts(replace(spec, rest_parameters=rest), linear)
    if stack.experts is None or _find_submodule(block, stack.experts.experts) is None:
        return spec
    return _with_experts(spec, stack.experts, block, where, config)


def _with_experts(spec: BlockSpec, found: Experts, block: nn.Module, where: str, config: Any) -> BlockSpec:
    """Return the spec with the routed experts of the block."""
    names = {"router": found.router, "experts": found.experts}
    layer = ExpertLayer.of(block, names)
    fits = (layer.count, layer.width) == (getattr(config, found.count_key), getattr(config, found.width_key))
    require(fits, f"{where}.{found.experts}: the number or width of experts differs from the config; {_PRUNED_BEFORE}")
    return replace(
        spec,
        experts=layer.count,
        expert_neurons=layer.count * layer.width,
        experts_per_token=layer.per_token,
        fewest_experts=layer.fewest,
        expert_groups=layer.groups,
        expert_parameters=layer.expert_parameters,
        expert_neuron_parameters=layer.neuron_parameters,
        expert_modules={part: f"{where}.{name}" for part, name in names.items()},
    )


def _with_counts(spec: BlockSpec, linear: dict[str, nn.Module]) -> BlockSpec:
    """Return the spec with the parameters of each kind of unit, counted in the live layers."""
    counts: dict[Kind, int] = {"heads": len(spec.head_tensors), "kv_heads": 0, "neurons": 0}
    for slot in spec.cut_slots():
        rows, columns = features(linear[slot])
        has_bias = getattr(linear[slot], "bias", None) is not None
        channel = rows if cut_dim(slot) == 1 else columns + has_bias
        for kind, unit in segments(spec, slot):
            if unit == 0:
                counts[kind] += channel * segment_size(spec, slot)
    return replace(
        spec,
        head_parameters=counts["heads"],
        kv_parameters=counts["kv_heads"],
        neuron_parameters=counts["neurons"],
    )


def _with_fixed(specs: list[BlockSpec], modules: list[nn.Module]) -> list[BlockSpec]:
    """Return the specs with the parameters that pruning cannot remove; of two in one module, the first has them."""
    fixed = {module: _base_parameters(module) for module in modules}
    for spec, module in zip(specs, modules, strict=True):
        fixed[module] -= removable_parameters(spec)
    return [replace(spec, fixed_parameters=fixed.pop(module, 0)) for spec, module in zip(specs, modules, strict=True)]


def _base_parameters(module: nn.Module) -> int:
    """Count the parameters of a module without PEFT; packed quantized ones count as the weights that they hold."""
    layer = base_layer(module)
    if is_linear(layer):
        return math.prod(features(layer)) + (features(layer)[0] if getattr(layer, "bias", None) is not None else 0)
    own = sum(p.numel() for p in layer.parameters(recurse=False))
    return own + sum(_base_parameters(child) for child in layer.children())


def _rest_parameters(spec: BlockSpec, attention: nn.Module) -> int:
    """Count the parameters of attention that belong to no unit, without the shared table of position biases."""
    table = spec.position_bias.rpartition(".")[2] if spec.position_bias else None
    rest = sum(p.numel() for n, p in attention.named_parameters(recurse=False) if n not in spec.head_tensors)
    for name, child in attention.named_children():
        layer = base_layer(child)
        if is_linear(layer):
            slots = [slot for slot, path in spec.projections.items() if path == f"{spec.attention}.{name}"]
            rest += sum(math.prod(features(layer)) for slot in slots if slot in spec.wide_norms)
            rest += 0 if slots else _base_parameters(layer)
        elif name != table:
            rest += sum(p.numel() for p in child.parameters())
    return rest


def _kv_heads(linear: dict[str, nn.Module], heads: int, head_dim: int, sizes: dict[str, int]) -> int:
    for slot in KEY_VALUE_SLOTS:
        if slot in linear:
            return features(linear[slot])[0] // sizes.get(slot, head_dim)
    return (features(linear["qkv"])[0] // head_dim - heads) // 2


def _activation(config: Any, stack: Stack) -> str | None:
    value = getattr(config, stack.activation_key, None)
    return value if isinstance(value, str) and value in ACT2FN else None


def _check_widths(spec: BlockSpec, linear: dict[str, nn.Module], stack: Stack, config: Any, where: str) -> None:
    fits = spec.kv_heads > 0 and spec.heads % spec.kv_heads == 0
    fits = fits and all(features(linear[slot])[cut_dim(slot)] == width(spec, slot) for slot in linear)
    key = stack.width_key_of(spec.projections)
    wanted = getattr(config, key, None) if key and spec.neurons else None
    require(fits and wanted in (None, spec.neurons), f"{where}: widths differ from the config; {_PRUNED_BEFORE}")


def _fitting_table(stack: Stack, block: nn.Module, where: str) -> dict[str, str]:
    """Return the first table of projections whose modules all exist."""
    for table in stack.tables:
        missing = [name for name in table.values() if _find_submodule(block, name) is None]
        if not missing:
            return table
    raise LightPeftError(f"the model has no {where}.{missing[0]}; {_PRUNED_BEFORE}")


def _find_linear(block: nn.Module, name: str, path: str) -> nn.Module:
    """Return the frozen linear layer `name` of a block, also from inside a PEFT module."""
    layer = base_layer(block.get_submodule(name))
    if not is_linear(layer):
        raise LightPeftError(
            f"{path} is a {describe(layer)}, which lightpeft cannot cut; load the base in float32, bfloat16 or "
            "float16, or quantized in a way that docs/how-to/low_memory.md lists"
        )
    return layer


def _uncut_endings(family: Family) -> tuple[str, ...]:
    """Return the name endings of linear layers that pruning does not change."""
    return tuple(f".{name}" for stack in family.stacks for name in stack.whole)


def _check_all_listed(model: nn.Module, specs: list[BlockSpec], stacks: list[str], whole: tuple[str, ...]) -> None:
    """Refuse blocks with linear layers that the family does not list, because cutting could change their input."""
    known = {name for spec in specs for name in spec.projections.values()}
    for path in dict.fromkeys(stacks):
        for name in _linear_names(model.get_submodule(path), path) if _find_submodule(model, path) is not None else ():
            require(
                name in known or name.endswith(whole),
                f"{name} cannot be pruned: the entry of the family does not list this projection",
            )


def _linear_names(module: nn.Module, path: str) -> Iterator[str]:
    """Yield the names of the linear layers below a module, also of those inside PEFT modules."""
    for child, inner in module.named_children():
        name = f"{path}.{child}"
        layer = base_layer(inner)
        if is_linear(layer):
            yield name
        elif layer is inner:
            yield from _linear_names(inner, name)


def _find_submodule(module: nn.Module, name: str) -> Any:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None
