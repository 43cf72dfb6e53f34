"""Surgery: applying a plan to a live model, which cuts base and PEFT modules in place and frees the memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from peft import PeftModel
from torch import nn

from lightpeft.errors import require
from lightpeft.machine import preserve_random_state
from lightpeft.models.all_weights import train_all
from lightpeft.models.arguments import change_arguments
from lightpeft.models.experts import ExpertLayer
from lightpeft.models.families.family_table import block_specs, family_of
from lightpeft.models.families.spec import Family
from lightpeft.models.linears.kinds import slice_parameter
from lightpeft.models.linears.linear_kinds import slice_linear
from lightpeft.models.on_disk import bring_weights_in
from lightpeft.models.unwrap import base_linear, transformers_model
from lightpeft.peft_kinds.sites.base import Site
from lightpeft.peft_kinds.sites.live_sites import drop_reference, find_sites, merge_site, refresh_config, remove_site
from lightpeft.plans.block_plan import BlockPlan
from lightpeft.plans.layout import cut_dim, head_channels, kept_channels, kept_experts
from lightpeft.plans.prune_plan import PrunePlan, check_fit
from lightpeft.plans.structure import FFN_SLOTS, BlockSpec, Quantity
from lightpeft.profiling.live import device_of
from lightpeft.prune.adapting import (
    KeptEntries,
    SelectedChannels,
    adapt_balance,
    adapt_generation,
    drop_attention,
    set_head_attribute,
    stop_sharing,
    unshared_tables,
)
from lightpeft.prune.depth import leave_out

_QUANTITY_VALUES: dict[Quantity, Callable[[BlockSpec, BlockPlan], int]] = {
    "heads": lambda spec, kept: len(kept.heads),
    "kv_heads": lambda spec, kept: len(kept.kv_heads),
    "heads_per_kv": lambda spec, kept: len(kept.heads) // len(kept.kv_heads),
    "width": lambda spec, kept: len(kept.heads) * spec.head_dim,
}
"""Quantity -> its value after the cut."""


def apply_plan(model: nn.Module, plan: PrunePlan, family: Family | None = None) -> None:
    """Cut a transformers model, or a PeftModel around one, in place to the units of a plan (Gu et al. 2024, pruning).

    Kept weights, frozen or trained, do not change by a bit, except where a quantized layer has to form new blocks, or
    PEFT is merged so that all weights train (`plan.train`). Optimizers from before hold the old parameters: make new
    ones.

    Example:
        plan = PrunePlan.load("runs/reviews/plan.json")
        apply_plan(model, plan)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    Args:
        model: dense model with the blocks that the plan was made for, or already without those that its depth drops.
        plan: the units to keep.
        family: module names of the model; None: the registered family of its model type.

    Raises:
        LightPeftError: the model does not have the dense structure that the plan was made for, or the plan is
            inconsistent; nothing was cut.
    """
    inner = transformers_model(model)
    family = family or family_of(inner.config.model_type)
    check_fit(plan)
    there = [spec.structure() for spec in block_specs(inner, family)]
    # a model whose depth was cut before, as for estimation, has the remaining blocks only
    specs = plan.specs[: max(len(there), len(plan.blocks))]
    same = there == [spec.structure() for spec in specs]
    require(same, "the plan is for another model, whose blocks have another structure; give the base that it is for")
    sites = _check_sites(model, plan) if isinstance(model, PeftModel) else []
    if isinstance(model, PeftModel):
        drop_reference(model)
    if plan.left_out:
        leave_out(model, len(plan.blocks))
    for site in sites:
        _cut_site(site, plan) if site.spec.name in plan.sites else remove_site(model, site)
    bias_tables = unshared_tables(inner, plan)
    for spec, kept in plan.parts:
        _cut_ffn(inner, spec, kept)
        _cut_experts(inner, spec, kept)
        _cut_attention(inner, spec, kept)
        if spec.shared_arguments and spec.position_bias in bias_tables and kept.heads:
            stop_sharing(inner.get_submodule(spec.attention), spec, kept, bias_tables[spec.position_bias], family)
    bring_weights_in(inner)  # of layers that lost nothing
    adapt_balance(inner, plan)
    adapt_generation(inner, plan, family)
    inner.light_pruned = bool(plan.removed_parameters)
    if isinstance(model, PeftModel):
        if plan.train == "all":
            for site in sites:
                if site.spec.name in plan.sites:
                    merge_site(model, site)
            train_all(model)
        refresh_config(model)


def cut_copy(model: PeftModel, plan: PrunePlan | None) -> PeftModel:
    """Return a copy of a model that is cut to a plan, or uncut if the plan is None; the random state does not change.

    The copy shares frozen parameters of which nothing is removed; a cut makes new parameters, and changes none.

    Raises:
        LightPeftError: the plan does not fit the model.
    """
    frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    with preserve_random_state(device_of(model)):
        shadow = copy.deepcopy(model, frozen)
        if plan is not None:
            apply_plan(shadow, plan)
    return shadow


def _check_sites(model: PeftModel, plan: PrunePlan) -> list[Site]:
    """Return the PEFT modules in the remaining blocks, and check that they are those of the plan."""
    sites = find_sites(model, [spec for spec, _ in plan.parts])
    dense = {site.spec.name: site.spec.rank for site in sites}
    planned = {site.name: site.rank for site in plan.dense_sites}
    require(dense == planned, "the plan is for other PEFT modules than this model has; use the same PEFT settings")
    return sites


def _block_of(site: Site, plan: PrunePlan) -> tuple[BlockSpec, BlockPlan]:
    index: int = site.spec.block  # type: ignore[assignment]
    return plan.specs[index], plan.blocks[index]


def _cut_site(site: Site, plan: PrunePlan) -> None:
    """Cut a PEFT module to its kept ranks and to the kept channels of its layer."""
    ranks = plan.sites[site.spec.name]
    if len(ranks) < site.spec.rank:
        site.keep_ranks(torch.tensor(ranks))
    site.fit(*_block_of(site, plan))


def _cut_ffn(inner: nn.Module, spec: BlockSpec, kept: BlockPlan) -> None:
    for slot in spec.projections:
        if slot in FFN_SLOTS:
            _cut_base(inner, spec, kept, slot)


def _cut_experts(inner: nn.Module, spec: BlockSpec, kept: BlockPlan) -> None:
    if len(kept.expert_neurons) == spec.expert_neurons:
        return
    ExpertLayer.of(inner, spec.expert_modules).cut(*kept_experts(spec, kept))


def _cut_attention(inner: nn.Module, spec: BlockSpec, kept: BlockPlan) -> None:
    if len(kept.heads) == spec.heads:
        return
    for slot in spec.projections:
        if slot not in FFN_SLOTS:
            _cut_base(inner, spec, kept, slot)
    attention = inner.get_submodule(spec.attention)
    if not kept.heads:
        drop_attention(inner, spec, attention)
        return
    for attribute, quantity in spec.head_attributes.items():
        set_head_attribute(attention, attribute, _QUANTITY_VALUES[quantity](spec, kept))
    for name in spec.head_tensors:
        _keep_entries(attention, name, kept.heads)
    for slot, name in spec.wide_norms.items():
        inner.set_submodule(name, SelectedChannels(inner.get_submodule(name), head_channels(spec, kept, slot)))
    if spec.per_head_arguments:
        index = torch.tensor(kept.heads)
        selected = {name: KeptEntries(index, dim).of for name, dim in spec.per_head_arguments.items()}
        change_arguments(attention, selected)


def _cut_base(inner: nn.Module, spec: BlockSpec, kept: BlockPlan, slot: str) -> None:
    index = kept_channels(spec, kept, slot)
    if index is not None:
        slice_linear(base_linear(inner, spec.projections[slot]), index, cut_dim(slot))


@torch.no_grad()
def _keep_entries(module: nn.Module, name: str, kept: Sequence[int]) -> None:
    """Keep some entries of a one-dimensional parameter."""
    setattr(module, name, slice_parameter(module.get_parameter(name), torch.tensor(kept), 0))
