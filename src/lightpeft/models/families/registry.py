"""From a live transformers model to the `BlockSpec`s of its blocks."""

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
from lightpeft.models.linears.registry import describe, features, is_linear
from lightpeft.plans.layout import Kind, cut_dim, segment_size, segments, width
from lightpeft.plans.records import removable_parameters
from lightpeft.plans.structure import KEY_VALUE_SLOTS, BlockSpec

FAMILIES: dict[str, Family] = {family.model_type: family for family in (*ENCODERS, *DECODERS, *ENCODER_DECODERS)}
"""Supported families by `config.model_type`."""

REFUSED: dict[str, str] = {
    "albert": "its layers share one set of weights, so a unit pruned in one layer would go in all",
    "bloom": "its attention adds the residual and reads ALiBi slopes of all heads",
}
"""Families that cannot be pruned, with the reason."""

_PRUNED_BEFORE = "a model that was pruned before cannot be pruned again"


def register_family(family: Family) -> None:
    """Make a family of your own known; it takes the place of one of the same model type."""
    FAMILIES[family.model_type] = family


def check_not_refused(model_type: str) -> None:
    """Refuse families that cannot be pruned; one that is not listed may yet be discovered.

    Raises:
        LightPeftError: with the reason.
    """
    if model_type in REFUSED:
        raise LightPeftError(f'model family "{model_type}" cannot be pruned: {REFUSED[model_type]}')


def family_of(model_type: str) -> Family:
    """The family of a model type.

    Raises:
        LightPeftError: the family is not supported; the message says why, or lists those that are.
    """
    check_not_refused(model_type)
    if model_type not in FAMILIES:
        raise LightPeftError(
            f'model family "{model_type}" is not supported; supported: {", ".join(sorted(FAMILIES))}. '
            "lightpeft.ensure_family(model) finds others, or a declarative entry: see docs/reference/families.md"
        )
    family = FAMILIES[model_type]
    here, first = transformers.__version__, ".".join(map(str, family.since))
    newer = tuple(int(part) for part in here.split(".")[:2]) >= family.since
    require(newer, f'model family "{model_type}" needs transformers {first} or newer; here is {here}')
    return family


def block_specs(model: PreTrainedModel, family: Family | None = None) -> list[BlockSpec]:
    """The prunable structure of every block of a transformers model (without PEFT, or with PEFT inside it).

    Args:
        model: the transformers model, with or without a task head.
        family: where its modules are; None: what is registered for its model type.

    Raises:
        LightPeftError: unsupported family, projections that the family does not name (as of cross-attention in BERT),
            layers of an unknown kind, or widths that do not fit the config (as of a model that was pruned before).
    """
    config = model.config
    require(not getattr(model, "light_pruned", False), f"this {type(model).__name__} has been pruned; {_PRUNED_BEFORE}")
    family = family or family_of(config.model_type)
    for key, value in family.needs.items():
        given = getattr(config, key, value)
        require(given == value, f"{family.model_type} with {key}={given} cannot be pruned; {key}={value} can")
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    specs: list[BlockSpec] = []
    modules: list[nn.Module] = []
    for stack in family.stacks:
        for layer, block in enumerate(_submodule(base, stack.layers) or ()):
            specs.append(_block_spec(stack, len(specs), layer, block, f"{prefix}{stack.layers}", config))
            modules.append(block)
    require(bool(specs), f"there is no {prefix}{family.stacks[0].layers} in this {type(model).__name__}")
    _check_complete(model, specs, [f"{prefix}{stack.layers}" for stack in family.stacks], _whole(family))
    return _with_fixed(specs, modules)


def block_lists(model: PreTrainedModel) -> list[nn.ModuleList]:
    """The lists of transformer blocks of a model, pruned or not, one a stack.

    Raises:
        LightPeftError: unsupported family.
    """
    base = model.base_model
    lists = [_submodule(base, stack.layers) for stack in family_of(model.config.model_type).stacks]
    return list({id(blocks): blocks for blocks in lists if blocks is not None}.values())


def max_positions(config: PretrainedConfig) -> int | None:
    """Tokens that the position table of a supported model has room for; None where nothing limits them."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    family = FAMILIES.get(config.model_type)
    if positions and family is not None and family.positions_after_padding:
        return positions - config.pad_token_id - 1
    return positions


def _block_spec(stack: Stack, index: int, layer: int, block: nn.Module, path: str, config: Any) -> BlockSpec:
    where = f"{path}.{layer}"
    table = _fitting_table(stack, block, where)
    linear = {slot: _linear(block, name, f"{where}.{name}") for slot, name in table.items()}
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
    if stack.experts is None or _submodule(block, stack.experts.experts) is None:
        return spec
    return _with_experts(spec, stack.experts, block, where, config)


def _with_experts(spec: BlockSpec, found: Experts, block: nn.Module, where: str, config: Any) -> BlockSpec:
    """The spec with the routed experts of the block."""
    names = {"router": found.router, "experts": found.experts}
    layer = ExpertLayer.of(block, names)
    fits = (layer.count, layer.width) == (getattr(config, found.count_key), getattr(config, found.width_key))
    require(fits, f"{where}.{found.experts}: widths do not match the config; {_PRUNED_BEFORE}")
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
    """The spec with the parameters that each kind of unit takes with it, counted in the live layers."""
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
    """The specs with the parameters that pruning leaves; of two in one module (cross-attention), the first has them."""
    fixed = {module: _base_parameters(module) for module in modules}
    for spec, module in zip(specs, modules, strict=True):
        fixed[module] -= removable_parameters(spec)
    return [replace(spec, fixed_parameters=fixed.pop(module, 0)) for spec, module in zip(specs, modules, strict=True)]


def _base_parameters(module: nn.Module) -> int:
    """Parameters of a module, quantised ones as many as they stand for; those of PEFT apart."""
    layer = _unwrapped(module)
    if is_linear(layer):
        return math.prod(features(layer)) + (features(layer)[0] if getattr(layer, "bias", None) is not None else 0)
    own = sum(p.numel() for p in layer.parameters(recurse=False))
    return own + sum(_base_parameters(child) for child in layer.children())


def _rest_parameters(spec: BlockSpec, attention: nn.Module) -> int:
    """Parameters of attention that are no unit's own; the shared table of position biases stays."""
    table = spec.position_bias.rpartition(".")[2] if spec.position_bias else None
    rest = sum(p.numel() for n, p in attention.named_parameters(recurse=False) if n not in spec.head_tensors)
    for name, child in attention.named_children():
        layer = _unwrapped(child)
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
    require(fits and wanted in (None, spec.neurons), f"{where}: widths do not match the config; {_PRUNED_BEFORE}")


def _fitting_table(stack: Stack, block: nn.Module, where: str) -> dict[str, str]:
    """The first table of projections whose modules are all there."""
    for table in stack.tables:
        missing = [name for name in table.values() if _submodule(block, name) is None]
        if not missing:
            return table
    raise LightPeftError(f"there is no {where}.{missing[0]}; {_PRUNED_BEFORE}")


def _linear(block: nn.Module, name: str, path: str) -> nn.Module:
    """The frozen linear layer at `name`, with a PEFT module around it or without."""
    layer = _unwrapped(block.get_submodule(name))
    if not is_linear(layer):
        raise LightPeftError(
            f"{path} is a {describe(layer)}, which is no linear layer that lightpeft can cut; "
            "load the base in float32, bfloat16 or float16, or quantised in a way that docs/how-to/low_memory.md lists"
        )
    return layer


def _whole(family: Family) -> tuple[str, ...]:
    """What the names of linear layers that stay as they are end with."""
    return tuple(f".{name}" for stack in family.stacks for name in stack.whole)


def _check_complete(model: nn.Module, specs: list[BlockSpec], stacks: list[str], whole: tuple[str, ...]) -> None:
    """Refuse blocks with linear layers that no slot names: cutting around them would change what they compute."""
    known = {name for spec in specs for name in spec.projections.values()}
    for path in dict.fromkeys(stacks):
        for name in _linear_names(model.get_submodule(path), path) if _submodule(model, path) is not None else ():
            require(
                name in known or name.endswith(whole),
                f"{name} is a projection that the family's entry does not know; it cannot be pruned",
            )


def _linear_names(module: nn.Module, path: str) -> Iterator[str]:
    """Names of the linear layers below a module; PEFT modules around them are looked through."""
    for child, inner in module.named_children():
        name = f"{path}.{child}"
        layer = _unwrapped(inner)
        if is_linear(layer):
            yield name
        elif layer is inner:
            yield from _linear_names(inner, name)


def _unwrapped(module: nn.Module) -> nn.Module:
    inner = getattr(module, "base_layer", None)
    return _unwrapped(inner) if isinstance(inner, nn.Module) else module


def _submodule(module: nn.Module, name: str) -> Any:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None
