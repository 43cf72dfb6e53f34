"""What a family that is not listed may look like, from one small random model of it.

Projections are found by what they compute (`probing`), head counts by value among the integers that the attention
module reads while it runs. What that leaves open (how fused rows lie, which integers count heads) is proposed every
way: parity of masks and surgery decides, in `lightpeft.discovery`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lightpeft.compat.torch import is_convolution
from lightpeft.compat.transformers import ACT2FN
from lightpeft.errors import LightPeftError, require
from lightpeft.models.families.probing import Probe, block_slots, run
from lightpeft.models.families.skeleton import random_inputs
from lightpeft.models.families.spec import Family, Stack
from lightpeft.models.linears import features, is_linear
from lightpeft.plans.structure import SLOTS, Role, role_named

_HEAD_KEYS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "attention_heads")
_HEAD_DIM_KEYS = ("head_dim", "d_kv", "kv_channels", "attention_head_dim", "attention_head_size")
_WIDTH_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "d_inner", "dff", "ffn_hidden_size", "hidden_dim")
_ACTIVATION_KEYS = ("hidden_act", "activation_function", "hidden_activation", "activation", "dense_act_fn", "afn")
_COUNT_NAMES = {
    "num_heads": "heads",
    "num_attention_heads": "heads",
    "n_heads": "heads",
    "n_head": "heads",
    "num_key_value_heads": "kv_heads",
    "num_kv_heads": "kv_heads",
    "n_kv_heads": "kv_heads",
    "num_key_value_groups": "heads_per_kv",
    "n_rep": "heads_per_kv",
    "all_head_size": "width",
    "inner_dim": "width",
    "split_size": "width",
    "embed_dim": "width",
}
"""What attributes of these names hold in transformers, where their value agrees; others are judged by value alone."""
_CANDIDATES = 64
"""Most proposals that are made of one model."""


@dataclass
class _Attention:
    """One attention of the blocks of a list, with the FFN that follows it or without."""

    layers: str
    table: dict[str, str]
    """Slot -> linear layer, relative to the block."""
    module: str
    heads_key: str
    head_dim_key: str
    sizes: dict[str, int]
    """Quantity that an entry of `head_attributes` may name -> its value here."""
    neurons: int
    role: Role | None
    label: str
    counts: dict[str, int]
    """Integers that the attention module reads while it runs."""
    outputs: int
    wide_norms: dict[str, str]
    per_head_arguments: dict[str, int]


def propose_families(small: PreTrainedModel) -> Iterator[Family]:
    """Families that the model may be one of, the likeliest first.

    Args:
        small: a model of the architecture, as `skeleton` makes it.

    Raises:
        LightPeftError: it has no blocks of attention and FFN whose parts are clear; the message says what was found.
    """
    lists = block_lists(small.base_model)
    require(lists, f"{type(small).__name__} has no list of equal blocks with linear layers")
    attentions = [found for path, block in lists.items() for found in _attentions(small, path, block)]
    if len(attentions) == 1:
        attentions[0].role, attentions[0].label = None, ""
    options = _count_options(attentions)
    layouts = (False, True) if any("qkv" in found.table for found in attentions) else (False,)
    for quantities in itertools.islice(itertools.product(*options.values()), _CANDIDATES):
        counts = {name: quantity for name, quantity in zip(options, quantities, strict=True) if quantity}
        for interleaved in layouts:
            stacks = tuple(_stack(small.config, found, interleaved, counts) for found in attentions)
            yield Family(small.config.model_type, stacks, positions_after_padding=_positions_after_padding(small))


def block_lists(base: nn.Module) -> dict[str, nn.Module]:
    """Path -> first entry of lists of modules of one class with at least three linear layers each; outermost only."""
    found: dict[str, nn.Module] = {}
    for path, module in base.named_modules():
        children = list(module.children()) if isinstance(module, nn.ModuleList) else []
        alike = len({type(child) for child in children}) == 1
        wide = all(sum(map(is_linear, child.modules())) >= 3 for child in children)
        if alike and wide and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = children[0]
    return found


def _attentions(small: PreTrainedModel, path: str, block: nn.Module) -> Iterator[_Attention]:
    """The attentions of a block in the order they run, the FFN with the first."""
    where, top = f"{path}.0", path.partition(".")[0]
    _check_no_experts(block, where)
    probe = Probe(small, block, where)
    attentions, ffn = block_slots(probe)
    for number, projections in enumerate(attentions):
        name = _common_parent([path for slot, path in projections.items() if slot != "o"])
        require(name, f"{where} runs attention itself, not in a module of its own")
        role = role_named(top) if number == 0 else "cross"
        slots = projections | (ffn if number == 0 else {})
        table = {slot: slots[slot] for slot in SLOTS if slot in slots}
        heads_key, head_dim_key, sizes = _sizes(small.config, probe, projections, path)
        seen = _watch(small, block, name, table)
        yield _Attention(
            layers=path,
            table=table,
            module=name,
            heads_key=heads_key,
            head_dim_key=head_dim_key,
            sizes=sizes,
            neurons=probe.features(table["ffn_out"])[1] if "ffn_out" in table else 0,
            role=role,
            label="" if role else top,
            counts=seen.counts,
            outputs=seen.outputs,
            wide_norms=seen.wide_norms,
            per_head_arguments=probe.per_head_arguments(name, table["o"], sizes["heads"]),
        )


def _check_no_experts(block: nn.Module, where: str) -> None:
    for name, module in block.named_modules():
        own = module.named_parameters(recurse=False) if not is_convolution(module) else ()
        for key, parameter in own:
            require(
                parameter.dim() < 3,
                f"{where}.{name}.{key} is one {parameter.dim()}-D parameter, as of experts, not linear layers",
            )


# Config keys


def _sizes(config: Any, probe: Probe, projections: dict[str, str], path: str) -> tuple[str, str, dict[str, int]]:
    """Keys of the number of heads and of the head dimension that fit the widths, and the quantities they give."""
    inputs = probe.features(projections["o"])[1]
    for heads_key in (f"{path.partition('.')[0]}_attention_heads", *_HEAD_KEYS):
        heads = getattr(config, heads_key, None)
        if type(heads) is not int or heads < 1:
            continue
        for head_dim_key in _HEAD_DIM_KEYS:
            head_dim = getattr(config, head_dim_key, None) or getattr(config, "hidden_size", 0) // heads
            if heads * head_dim == inputs:
                rows = probe.features(projections.get("k") or projections["qkv"])[0] // head_dim
                kv_heads = rows if "k" in projections else (rows - heads) // 2
                groups = heads // kv_heads if kv_heads > 0 else 0
                sizes = {"heads": heads, "kv_heads": kv_heads, "heads_per_kv": groups, "width": inputs}
                return heads_key, head_dim_key, sizes
    raise LightPeftError(f"no number of heads in {type(config).__name__} fits attention of {inputs} channels")


def _width_key(config: Any, found: _Attention) -> str | None:
    keys = (f"{found.layers.partition('.')[0]}_ffn_dim", *_WIDTH_KEYS)
    return next((key for key in keys if found.neurons and getattr(config, key, None) == found.neurons), None)


def _activation_key(config: Any) -> str:
    values = {key: getattr(config, key, None) for key in _ACTIVATION_KEYS}
    fitting = (key for key, value in values.items() if isinstance(value, str) and value in ACT2FN)
    return next(fitting, _ACTIVATION_KEYS[0])


def _positions_after_padding(small: PreTrainedModel) -> bool:
    """Whether a table of positions has an entry for padding, as RoBERTa's."""
    positions = getattr(small.config, "max_position_embeddings", None)
    tables = [module for module in small.modules() if isinstance(module, nn.Embedding)]
    return any(table.padding_idx is not None and table.num_embeddings == positions for table in tables)


# What the attention module reads and returns


@dataclass
class _Seen:
    counts: dict[str, int]
    outputs: int
    """Length of the tuple that attention returns."""
    wide_norms: dict[str, str]
    """"q" or "k" -> norm over all its heads, relative to the block."""


def _watch(small: PreTrainedModel, block: nn.Module, name: str, table: dict[str, str]) -> _Seen:
    """Run the model once and note what the attention module `name` reads and returns, and norms of q and k."""
    attention = block.get_submodule(name)
    seen = _Seen({}, 0, {})
    produced: dict[str, Tensor] = {}  # kept, so that no storage is used again

    def note_returned(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.outputs = len(output) if isinstance(output, tuple | list) else 1

    def note_produced(slot: str) -> Callable[..., None]:
        return lambda module, args, output: produced.update({slot: output})

    def note_norm(slot: str, norm: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if slot in produced and args[0].untyped_storage().data_ptr() == produced[slot].untyped_storage().data_ptr():
                seen.wide_norms[slot] = f"{name}.{norm}"

        return note

    handles = [attention.register_forward_hook(note_returned)]
    for slot in {"q", "k"} & table.keys():
        linear = block.get_submodule(table[slot])
        handles.append(linear.register_forward_hook(note_produced(slot)))
        for path, module in attention.named_modules():
            over_all_heads = [p.shape for p in module.parameters()][:1] == [(features(linear)[0],)]
            if over_all_heads and not is_linear(module):
                handles.append(module.register_forward_pre_hook(note_norm(slot, path)))
    with _Reading(attention) as reading:
        run(small, random_inputs(small), handles)
    seen.counts = reading.found
    return seen


class _Reading:
    """While it is entered, notes the integers that are read from a module, and by the module from the config."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind, self.config = module, type(module), vars(module).get("config")
        self.found: dict[str, int] = {}

    def __enter__(self) -> _Reading:
        found = self.found

        class Watched(self.kind):  # type: ignore[name-defined]
            def __getattribute__(self, name: str) -> Any:
                return _noted(found, name, super().__getattribute__(name))

        self.module.__class__ = Watched
        if self.config is not None:
            vars(self.module)["config"] = _WatchedConfig(self.config, found)
        return self

    def __exit__(self, *error: object) -> None:
        self.module.__class__ = self.kind
        if self.config is not None:
            vars(self.module)["config"] = self.config


class _WatchedConfig:
    def __init__(self, config: Any, found: dict[str, int]) -> None:
        self._config, self._found = config, found

    def __getattr__(self, name: str) -> Any:
        return _noted(self._found, f"config.{name}", getattr(self._config, name), name)


def _noted(found: dict[str, int], key: str, value: Any, name: str = "") -> Any:
    if type(value) is int and not (name or key).startswith("_"):
        found[key] = value
    return value


def _count_options(attentions: list[_Attention]) -> dict[str, list[str | None]]:
    """Attribute -> quantities that it may hold wherever it is read, the likeliest first; None: it counts no heads."""
    options: dict[str, list[str | None]] = {}
    for found in attentions:
        for name, value in found.counts.items():
            fitting = _quantities(name, value, found.sizes)
            options[name] = [quantity for quantity in options.get(name, fitting) if quantity in fitting]
    return {name: quantities for name, quantities in options.items() if quantities not in ([], [None])}


def _quantities(attribute: str, value: int, sizes: dict[str, int]) -> list[str | None]:
    matches: list[str | None] = [quantity for quantity, size in sizes.items() if size == value]
    known = _COUNT_NAMES.get(attribute.rpartition(".")[2])
    if known in matches:
        return [known]
    return [None] if value == 1 else [None, *matches]  # a count of 1 never changes


def _stack(config: Any, found: _Attention, interleaved: bool, counts: dict[str, str]) -> Stack:
    return Stack(
        layers=found.layers,
        attention=found.module,
        projections=found.table,
        head_attributes={name: quantity for name, quantity in counts.items() if name in found.counts},
        heads_key=found.heads_key,
        head_dim_key=found.head_dim_key,
        width_key=_width_key(config, found),
        activation_key=_activation_key(config),
        role=found.role,
        label=found.label,
        interleaved=interleaved and "qkv" in found.table,
        wide_norms=found.wide_norms,
        per_head_arguments=found.per_head_arguments,
        attention_outputs=found.outputs,
    )


def _common_parent(names: list[str]) -> str:
    """The innermost module that holds all of these."""
    parents = [name.split(".")[:-1] for name in names]
    levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parents, strict=False))
    return ".".join(level[0] for level in levels)
