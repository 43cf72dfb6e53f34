"""Proposals of structures for a family that is not listed, from one small random model of it.

Queries, keys and values are recognized by their names, all other projections by their order in a block. Every variant
of the rest (layout of fused rows, source of head counts) is proposed; `lightpeft.prune.discovery` checks the proposals.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lightpeft.compat.transformers import ACT2FN
from lightpeft.errors import LightPeftError, require
from lightpeft.models.families.skeleton import random_inputs, run
from lightpeft.models.families.spec import Family, Stack
from lightpeft.models.linears.linear_kinds import features, is_linear
from lightpeft.plans.structure import SLOTS, Quantity, role_named

_HEAD_KEYS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "attention_heads")
_HEAD_DIM_KEYS = ("head_dim", "d_kv", "kv_channels", "attention_head_dim", "attention_head_size")
_WIDTH_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "d_inner", "dff", "ffn_hidden_size", "hidden_dim")
_ACTIVATION_KEYS = ("hidden_act", "activation_function", "hidden_activation", "activation", "dense_act_fn", "afn")
_SLOT_NAMES = {
    "q": ("q", "q_proj", "q_lin", "query", "query_proj"),
    "k": ("k", "k_proj", "k_lin", "key", "key_proj"),
    "v": ("v", "v_proj", "v_lin", "value", "value_proj"),
    "qkv": ("qkv", "qkv_proj", "query_key_value", "c_attn", "Wqkv"),
}
_COUNT_NAMES: dict[str, Quantity] = {
    "num_heads": "heads",
    "num_attention_heads": "heads",
    "n_heads": "heads",
    "n_head": "heads",
    "num_key_value_heads": "kv_heads",
    "num_kv_heads": "kv_heads",
    "num_key_value_groups": "heads_per_kv",
    "n_rep": "heads_per_kv",
    "all_head_size": "width",
    "inner_dim": "width",
    "split_size": "width",
    "embed_dim": "width",
    "hidden_size": "width",
}
"""Attribute name in transformers -> the quantity that it holds, if its value agrees."""


@dataclass
class _FoundAttention:
    """One attention of the blocks of a list, with the FFN that follows it, if there is one."""

    path: str
    """Path of the list of blocks."""
    module: str
    table: dict[str, str]
    """Slot -> linear layer, relative to the block."""
    heads_key: str
    head_dim_key: str
    counts: dict[str, Quantity]
    """Attribute of the attention module, or of its config -> the quantity that it holds."""
    outputs: int
    wide_norms: dict[str, str]
    neurons: int
    cross: bool


def propose_families(small: PreTrainedModel) -> Iterator[Family]:
    """Yield families with possible structures of a model, the most likely first.

    Args:
        small: a model of the architecture, made by `skeleton`.

    Raises:
        LightPeftError: no blocks of attention and FFN can be recognized; the message names the part.
    """
    lists = block_lists(small.base_model)
    require(lists, f"{type(small).__name__} has no list of equal blocks with linear layers")
    attentions = [found for path, block in lists.items() for found in _attentions(small, path, block)]
    layouts = (False, True) if any("qkv" in found.table for found in attentions) else (False,)
    for of_config, interleaved in itertools.product((False, True), layouts):
        stacks = [_make_stack(small.config, found, interleaved, of_config, len(attentions) > 1) for found in attentions]
        yield Family(small.config.model_type, tuple(stacks), positions_after_padding=_positions_after_padding(small))


def block_lists(base: nn.Module) -> dict[str, nn.Module]:
    """Find outermost lists of modules of one class with at least three linear layers each: path -> first module."""
    found: dict[str, nn.Module] = {}
    for path, module in base.named_modules():
        children = list(module.children()) if isinstance(module, nn.ModuleList) else []
        alike = len({type(child) for child in children}) == 1
        wide = all(sum(map(is_linear, child.modules())) >= 3 for child in children)
        if alike and wide and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = children[0]
    return found


def _attentions(small: PreTrainedModel, path: str, block: nn.Module) -> Iterator[_FoundAttention]:
    """Yield the attentions of a block; the first one includes the FFN."""
    where = f"{path}.0"
    whole = all(parameter.dim() < 3 for parameter in block.parameters())
    require(whole, f"{where} has parameters of more than two dimensions, like experts and convolutions")
    tables, rest = _attention_tables(block)
    require(tables, f"{where} has no attention with known names of queries, keys and values")
    ffn = _ffn_table(block, rest, where)
    for number, table in enumerate(tables):
        name = table["q" if "q" in table else "qkv"].rpartition(".")[0]
        require(name, f"{where} has no attention module: the block itself computes attention")
        module = block.get_submodule(name)
        heads_key, head_dim_key, sizes = _find_sizes(small.config, block, table, path)
        counts = {key: held for key, held in _COUNT_NAMES.items() if getattr(module, key, None) == sizes[held]}
        if hasattr(module, "config"):
            shared = {key: _COUNT_NAMES[key] for key in ("num_attention_heads", "num_key_value_heads")}
            fitting = {key: held for key, held in shared.items() if getattr(small.config, key, None) == sizes[held]}
            counts |= {f"config.{key}": held for key, held in fitting.items()}
        slots = table | (ffn if number == 0 else {})
        yield _FoundAttention(
            path=path,
            module=name,
            table={slot: slots[slot] for slot in SLOTS if slot in slots},
            heads_key=heads_key,
            head_dim_key=head_dim_key,
            counts=counts,
            outputs=_count_outputs(small, module),
            wide_norms=_wide_norms(block, name, table),
            neurons=features(block.get_submodule(ffn["ffn_out"]))[1] if ffn and number == 0 else 0,
            cross=number > 0,
        )


def _attention_tables(block: nn.Module) -> tuple[list[dict[str, str]], list[str]]:
    """Return slot -> linear layer for every attention of a block, and all other linear layers.

    The output projection is in the same module as queries, keys and values, or else the next linear layer.
    """
    names = [name for name, module in block.named_modules() if is_linear(module)]
    tables: list[dict[str, str]] = [{}]
    for name in names:
        slot = next((slot for slot, known in _SLOT_NAMES.items() if name.rpartition(".")[2] in known), None)
        if slot is not None:
            tables[-1][slot] = name
        if tables[-1].keys() in ({"q", "k", "v"}, {"qkv"}):
            tables.append({})
    tables = tables[:-1]
    rest = [name for name in names if not any(name in table.values() for table in tables)]
    for table in tables:
        last = max(table.values(), key=names.index)
        inside = [name for name in rest if name.startswith(f"{last.rpartition('.')[0]}.")]
        behind = [name for name in rest if names.index(name) > names.index(last)]
        require(inside or behind, f"no linear layer comes after {last}, which could be the output of attention")
        table["o"] = (inside or behind)[0]
        rest.remove(table["o"])
    return tables, rest


def _ffn_table(block: nn.Module, rest: list[str], where: str) -> dict[str, str]:
    """Return slot -> linear layer of a block's FFN, whose last layer is its output; empty without an FFN."""
    if not rest:
        return {}
    *inside, output = rest
    neurons = features(block.get_submodule(output))[1]
    widths = [features(block.get_submodule(name))[0] for name in inside]
    gates = [name for name in inside if "gate" in name.rpartition(".")[2]]
    if widths == [neurons]:
        return {"ffn_in": inside[0], "ffn_out": output}
    if widths == [2 * neurons]:
        return {"ffn_gate_in": inside[0], "ffn_out": output}
    others = f"{where} has linear layers beside attention that are not one FFN: {', '.join(rest)}"
    require(widths == [neurons] * 2 and len(gates) == 1, others)
    (up,) = (name for name in inside if name not in gates)
    return {"ffn_in": up, "ffn_gate": gates[0], "ffn_out": output}


def _wide_norms(block: nn.Module, attention: str, table: dict[str, str]) -> dict[str, str]:
    """Return "q" or "k" -> the norm over all its heads together."""
    found = {}
    for slot in {"q", "k"} & table.keys():
        norm = getattr(block.get_submodule(attention), f"{slot}_norm", None)
        weight = getattr(norm, "weight", None)
        if weight is not None and weight.shape == (features(block.get_submodule(table[slot]))[0],):
            found[slot] = f"{attention}.{slot}_norm"
    return found


def _count_outputs(small: PreTrainedModel, attention: nn.Module) -> int:
    """Measure the length of the tuple that attention returns."""
    lengths = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        lengths.append(len(output) if isinstance(output, tuple | list) else 1)

    run(small, random_inputs(small), [attention.register_forward_hook(note)])
    require(lengths, f"{type(attention).__name__} is not called in a forward pass")
    return lengths[0]


# Config keys


def _find_sizes(config: Any, block: nn.Module, table: dict[str, str], path: str) -> tuple[str, str, dict[str, int]]:
    """Find the config keys of the number of heads and of the head dimension that fit the widths, and the quantities."""
    inputs = features(block.get_submodule(table["o"]))[1]
    for heads_key in (f"{path.partition('.')[0]}_attention_heads", *_HEAD_KEYS):
        heads = getattr(config, heads_key, None)
        if type(heads) is not int or heads < 1:
            continue
        for head_dim_key in _HEAD_DIM_KEYS:
            head_dim = getattr(config, head_dim_key, None) or getattr(config, "hidden_size", 0) // heads
            if heads * head_dim == inputs:
                rows = features(block.get_submodule(table.get("k") or table["qkv"]))[0] // head_dim
                kv_heads = rows if "k" in table else (rows - heads) // 2
                groups = heads // kv_heads if kv_heads > 0 else 0
                sizes = {"heads": heads, "kv_heads": kv_heads, "heads_per_kv": groups, "width": inputs}
                return heads_key, head_dim_key, sizes
    raise LightPeftError(f"no number of heads in {type(config).__name__} fits attention of {inputs} channels")


def _width_key(config: Any, found: _FoundAttention) -> str | None:
    keys = (f"{found.path.partition('.')[0]}_ffn_dim", *_WIDTH_KEYS)
    return next((key for key in keys if found.neurons and getattr(config, key, None) == found.neurons), None)


def _activation_key(config: Any) -> str:
    values = {key: getattr(config, key, None) for key in _ACTIVATION_KEYS}
    fitting = (key for key, value in values.items() if isinstance(value, str) and value in ACT2FN)
    return next(fitting, _ACTIVATION_KEYS[0])


def _positions_after_padding(small: PreTrainedModel) -> bool:
    """Return whether a table of positions has an entry for padding, as in RoBERTa."""
    positions = getattr(small.config, "max_position_embeddings", None)
    tables = [module for module in small.modules() if isinstance(module, nn.Embedding)]
    return any(table.padding_idx is not None and table.num_embeddings == positions for table in tables)


def _make_stack(config: Any, found: _FoundAttention, interleaved: bool, of_config: bool, several: bool) -> Stack:
    top = found.path.partition(".")[0]
    role = ("cross" if found.cross else role_named(top)) if several else None
    return Stack(
        layers=found.path,
        attention=found.module,
        projections=found.table,
        head_attributes={key: held for key, held in found.counts.items() if of_config or not key.startswith("config.")},
        heads_key=found.heads_key,
        head_dim_key=found.head_dim_key,
        width_key=_width_key(config, found),
        activation_key=_activation_key(config),
        role=role,
        label="" if role or not several else top,
        interleaved=interleaved and "qkv" in found.table,
        wide_norms=found.wide_norms,
        attention_outputs=found.outputs,
    )
