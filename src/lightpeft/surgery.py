"""Applying a plan to a live model: base and PEFT modules are cut together, in place, and the memory is freed."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from lightpeft.errors import LightPeftError, require
from lightpeft.records import BlockPlan, PrunePlan, check_fit
from lightpeft.sites import (
    Site,
    base_layer,
    base_linear,
    find_sites,
    refresh_config,
    remove_site,
    slice_linear,
    transformers_model,
)
from lightpeft.structure import BlockSpec

_QUANTITIES = {
    "heads": lambda spec, kept: len(kept.heads),
    "kv_heads": lambda spec, kept: len(kept.kv_heads),
    "heads_per_kv": lambda spec, kept: len(kept.heads) // len(kept.kv_heads),
    "width": lambda spec, kept: len(kept.heads) * spec.head_dim,
}
"""What a family's `head_attributes` may name."""


def apply_plan(model: nn.Module, plan: PrunePlan) -> None:
    """Cut a transformers model, or a PeftModel around one, down to what the plan keeps.

    Kept weights, frozen or trained, are bit-equal to what they were. Optimizers made before hold the old parameters:
    make new ones.

    Raises:
        LightPeftError: the model does not have the dense structure that the plan was made for, or the plan keeps what
            was not there; nothing was cut.
    """
    inner = transformers_model(model)
    check_fit(plan)
    for spec in plan.specs:
        _check_structure(inner, spec)
    if isinstance(model, PeftModel):
        _cut_sites(model, plan)
    for spec, kept in zip(plan.specs, plan.blocks, strict=True):
        _cut_attention(inner, spec, kept)
        _cut_ffn(inner, spec, kept)
    if isinstance(model, PeftModel):
        refresh_config(model)


def _check_structure(inner: nn.Module, spec: BlockSpec) -> None:
    """Check one block against its spec, so that a plan for another model is refused before anything is cut."""
    query, width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    expected = {"q": (query, 0), "k": (width, 0), "v": (width, 0), "o": (query, 1)}
    expected |= {"ffn_in": (spec.neurons, 0), "ffn_gate": (spec.neurons, 0), "ffn_out": (spec.neurons, 1)}
    for slot, name in spec.projections.items():
        try:
            layer = base_layer(inner.get_submodule(name))
        except AttributeError as error:
            raise LightPeftError(f"the plan is for another model: there is no module {name}") from error
        size, axis = expected[slot]
        weight = getattr(layer, "weight", None)
        require(
            isinstance(layer, nn.Linear) and weight is not None and weight.shape[axis] == size,
            f"the plan is for another model, or this one was pruned before: {name} is not {size} wide",
        )


def _cut_sites(model: PeftModel, plan: PrunePlan) -> None:
    """Remove PEFT modules that go and cut those that stay: along their ranks and along the cut base dimensions."""
    sites = find_sites(model, plan.specs)
    dense = {site.spec.name: site.spec.rank for site in sites}
    planned = {site.name: site.rank for site in plan.dense_sites}
    require(dense == planned, "the plan is for other PEFT modules than this model has")
    for site in sites:
        if site.spec.name in plan.sites:
            _cut_site(site, plan)
        else:
            remove_site(model, site.spec.name)


def _cut_site(site: Site, plan: PrunePlan) -> None:
    spec, kept = plan.specs[site.spec.block], plan.blocks[site.spec.block]  # type: ignore[index]
    ranks = plan.sites[site.spec.name]
    if len(ranks) < site.spec.rank:
        site.keep_ranks(torch.tensor(ranks))
    index, dim = _channels(spec, kept, site.spec.slot)  # type: ignore[arg-type]
    if index is None:
        return
    (site.keep_outputs if dim == 0 else site.keep_inputs)(index.to(site.down.device))


def _cut_attention(inner: nn.Module, spec: BlockSpec, kept: BlockPlan) -> None:
    if len(kept.heads) == spec.heads:
        return
    for slot in ("q", "k", "v", "o"):
        _cut_base(inner, spec, kept, slot)
    attention = inner.get_submodule(spec.attention)
    if not kept.heads:
        _drop_attention(inner, spec, attention)
        return
    for attribute, quantity in spec.head_attributes.items():
        setattr(attention, attribute, _QUANTITIES[quantity](spec, kept))


def _cut_ffn(inner: nn.Module, spec: BlockSpec, kept: BlockPlan) -> None:
    if len(kept.neurons) < spec.neurons:
        for slot in ("ffn_in", "ffn_gate", "ffn_out"):
            if slot in spec.projections:
                _cut_base(inner, spec, kept, slot)


def _cut_base(inner: nn.Module, spec: BlockSpec, kept: BlockPlan, slot: str) -> None:
    index, dim = _channels(spec, kept, slot)
    if index is not None:
        slice_linear(base_linear(inner, spec.projections[slot]), index, dim)


def _channels(spec: BlockSpec, kept: BlockPlan, slot: str) -> tuple[Tensor | None, int]:
    """Channels of a projection that stay (None: all) and the weight dimension they sit in (0: out, 1: in)."""
    dim = 1 if slot in ("o", "ffn_out") else 0
    if slot in ("ffn_in", "ffn_gate", "ffn_out"):
        units, dense, size = kept.neurons, spec.neurons, 1
    elif slot in ("k", "v"):
        units, dense, size = kept.kv_heads, spec.kv_heads, spec.head_dim
    else:
        units, dense, size = kept.heads, spec.heads, spec.head_dim
    if len(units) == dense:
        return None, dim
    first = torch.tensor(units, dtype=torch.long) * size
    return (first.unsqueeze(1) + torch.arange(size)).flatten(), dim


def _drop_attention(inner: nn.Module, spec: BlockSpec, attention: nn.Module) -> None:
    """Replace attention without heads by a module that only adds the bias of the output projection."""
    output_name = spec.projections["o"]
    inside = output_name.startswith(f"{spec.attention}.")
    child = output_name[len(spec.attention) + 1 :] if inside else None
    stub = DroppedAttention(attention, child)
    parent, _, name = spec.attention.rpartition(".")
    setattr(inner.get_submodule(parent), name, stub)


class DroppedAttention(nn.Module):
    """Attention that lost all heads: no projection, no scores; what stays is the output projection's bias.

    The KV cache still counts the tokens of this layer (one channel of zeros a token), because lengths and positions
    are read from the cache of whichever layer comes first.
    """

    def __init__(self, attention: nn.Module, output: str | None) -> None:
        super().__init__()
        self.layer_idx = getattr(attention, "layer_idx", None)
        self.output_name = output
        if output is not None:
            self.add_module(output, attention.get_submodule(output))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """[batch, length, width] -> ([batch, length, width of what follows], None)."""
        cache = kwargs.get("cache") if kwargs.get("cache") is not None else kwargs.get("past_key_values")
        if cache is not None:
            counted = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(counted, counted, self.layer_idx)
        nothing = hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
        if self.output_name is None:
            return nothing, None
        return self.get_submodule(self.output_name)(nothing), None
