"""Applying a plan to a live model: base and PEFT modules are cut together, in place, and the memory is freed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache

from lightpeft.compat.transformers import grow_static_cache
from lightpeft.config import Budget
from lightpeft.errors import LightPeftError, require
from lightpeft.machine import random_apart
from lightpeft.models.arguments import change_arguments
from lightpeft.models.experts import ExpertLayer
from lightpeft.models.families import block_specs
from lightpeft.models.linears import fault, features, is_linear, slice_linear, sliced
from lightpeft.models.on_disk import bring_weights_in
from lightpeft.models.unwrap import base_layer, base_linear, transformers_model
from lightpeft.peft_kinds.sites import Site, check_removable, drop_reference, find_sites, refresh_config, remove_site
from lightpeft.plans.layout import cut_dim, head_channels, kept_channels, kept_experts, width
from lightpeft.plans.planning import check_experts
from lightpeft.plans.records import BlockPlan, PrunePlan, check_fit
from lightpeft.plans.structure import BlockSpec
from lightpeft.profiling.live import device_of
from lightpeft.prune.depth import leave_out

_QUANTITIES = {
    "heads": lambda spec, kept: len(kept.heads),
    "kv_heads": lambda spec, kept: len(kept.kv_heads),
    "heads_per_kv": lambda spec, kept: len(kept.heads) // len(kept.kv_heads),
    "width": lambda spec, kept: len(kept.heads) * spec.head_dim,
}
"""What a family's `head_attributes` may name."""


def apply_plan(model: nn.Module, plan: PrunePlan) -> None:
    """Cut a transformers model, or a PeftModel around one, down to what the plan keeps.

    Kept weights, frozen or trained, are bit-equal to what they were, except where a quantised layer has to form new
    blocks (`quantised`). Optimizers made before hold the old parameters: make new ones.

    Raises:
        LightPeftError: the model does not have the dense structure that the plan was made for, or the plan keeps what
            was not there; nothing was cut.
    """
    inner = transformers_model(model)
    check_fit(plan)
    there = [spec.structure() for spec in block_specs(inner)]
    # a model whose depth was cut before, as for estimation, has the blocks that stay
    specs = plan.specs[: max(len(there), len(plan.blocks))]
    for spec in specs:
        _check_structure(inner, spec)
    same = there == [spec.structure() for spec in specs]
    require(same, "the plan is for another model: its blocks have other parts than those of this one")
    _check_widths(inner, plan)
    sites = _checked_sites(model, plan) if isinstance(model, PeftModel) else []
    if isinstance(model, PeftModel):
        drop_reference(model)
    if plan.left_out:
        leave_out(model, len(plan.blocks))
    for site in sites:
        _cut_site(site, plan) if site.spec.name in plan.sites else remove_site(model, site)
    apart = _stacks_apart(plan)
    tables = {name: inner.get_submodule(name) for name in apart if name}
    for spec, kept in plan.parts:
        _cut_ffn(inner, spec, kept)
        _cut_experts(inner, spec, kept)
        _cut_attention(inner, spec, kept)
        if spec.shared_arguments and spec.position_bias in apart and kept.heads:
            _stop_sharing(inner.get_submodule(spec.attention), spec, kept, tables)
    bring_weights_in(inner)  # of layers that lost nothing
    _adapt_balance(inner, plan)
    _adapt_generation(inner, plan)
    inner.light_pruned = bool(plan.removed_parameters)
    if isinstance(model, PeftModel):
        refresh_config(model)


def cut_copy(model: PeftModel, plan: PrunePlan | None) -> PeftModel:
    """A copy that is cut down to a plan; None: nothing is cut. Random numbers stay as they are.

    Frozen parameters are the model's own where nothing of them goes: a cut makes new ones, and changes none.

    Raises:
        LightPeftError: as `apply_plan` does.
    """
    frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    with random_apart(device_of(model)):
        shadow = copy.deepcopy(model, frozen)
        if plan is not None:
            apply_plan(shadow, plan)
    return shadow


def check_budget(model: nn.Module, budget: Budget) -> None:
    """Refuse a budget by which a quantised layer may get a width that it cannot have, or a layer fewer experts than a
    token is routed to; call it before estimation.

    Raises:
        LightPeftError: naming the layer or the ratio, with what to set instead.
    """
    by_parameters = budget.blocks is not None or budget.target is not None
    instead = ", with light.neurons in place of light.blocks and light.target" if by_parameters else ""
    for spec in block_specs(transformers_model(model)):
        check_experts(spec, budget)
        balanced = budget.head_unit == "balanced" and spec.heads_per_kv > 1
        unit = spec.kv_heads if balanced else spec.heads_per_kv
        if budget.heads or by_parameters:
            _check_unit(model, spec, "o", unit * spec.head_dim, f"set light.heads to 0{instead}")
        if spec.neurons and (budget.neurons or by_parameters):
            _check_unit(model, spec, "ffn_out", budget.multiple_of, "set light.multiple_of to a multiple of these")


def _check_unit(model: nn.Module, spec: BlockSpec, slot: str, width: int, instead: str) -> None:
    name = spec.projections[slot]
    reason = fault(base_linear(model, name), width, cut_dim(slot))
    require(reason is None, f"{name} cannot be cut in steps of {width}: {reason}; {instead}, or quantise by rows")


def _check_structure(inner: nn.Module, spec: BlockSpec) -> None:
    """Check one block against its spec, so that a plan for another model is refused before anything is cut."""
    for slot, name in spec.projections.items():
        try:
            layer = base_layer(inner.get_submodule(name))
        except AttributeError as error:
            raise LightPeftError(f"the plan is for another model: there is no module {name}") from error
        expected = width(spec, slot)
        require(
            is_linear(layer) and features(layer)[cut_dim(slot)] == expected,
            f"the plan is for another model, or this one was pruned before: {name} is not {expected} wide",
        )


def _check_widths(inner: nn.Module, plan: PrunePlan) -> None:
    """Refuse widths that a quantised layer cannot have, before anything is cut."""
    for spec, kept in plan.parts:
        for slot, name in spec.projections.items():
            index = kept_channels(spec, kept, slot)
            reason = fault(base_linear(inner, name), len(index), cut_dim(slot)) if index is not None else None
            require(reason is None, f"{name} cannot be cut: {reason}")


def _checked_sites(model: PeftModel, plan: PrunePlan) -> list[Site]:
    """The PEFT modules in blocks that stay; refuses those that do not fit, or cannot go, before anything is cut."""
    sites = find_sites(model, [spec for spec, _ in plan.parts])
    dense = {site.spec.name: site.spec.rank for site in sites}
    planned = {site.name: site.rank for site in plan.dense_sites}
    require(dense == planned, "the plan is for other PEFT modules than this model has")
    check_removable(model, [site for site in sites if site.spec.name not in plan.sites])
    return sites


def _block_of(site: Site, plan: PrunePlan) -> tuple[BlockSpec, BlockPlan]:
    index: int = site.spec.block  # type: ignore[assignment]
    return plan.specs[index], plan.blocks[index]


def _cut_site(site: Site, plan: PrunePlan) -> None:
    """Cut a PEFT module along its ranks and to what stays of the layer that it is on."""
    ranks = plan.sites[site.spec.name]
    if len(ranks) < site.spec.rank:
        site.keep_ranks(torch.tensor(ranks))
    site.fit(*_block_of(site, plan))


def _cut_ffn(inner: nn.Module, spec: BlockSpec, kept: BlockPlan) -> None:
    for slot in spec.projections:
        if slot.startswith("ffn"):
            _cut_base(inner, spec, kept, slot)


def _cut_experts(inner: nn.Module, spec: BlockSpec, kept: BlockPlan) -> None:
    if len(kept.expert_neurons) == spec.expert_neurons:
        return
    ExpertLayer.of(inner, spec.expert_modules).cut(*kept_experts(spec, kept))


def _cut_attention(inner: nn.Module, spec: BlockSpec, kept: BlockPlan) -> None:
    if len(kept.heads) == spec.heads:
        return
    for slot in spec.projections:
        if not slot.startswith("ffn"):
            _cut_base(inner, spec, kept, slot)
    attention = inner.get_submodule(spec.attention)
    if not kept.heads:
        _drop_attention(inner, spec, attention)
        return
    for attribute, quantity in spec.head_attributes.items():
        _set_head_attribute(attention, attribute, _QUANTITIES[quantity](spec, kept))
    for name in spec.head_tensors:
        _keep_entries(attention, name, kept.heads)
    for slot, name in spec.wide_norms.items():
        _replace(inner, name, SelectedChannels(inner.get_submodule(name), head_channels(spec, kept, slot)))
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
    """Keep some entries of a parameter [all]."""
    setattr(module, name, sliced(module.get_parameter(name), torch.tensor(kept), 0))


def _replace(inner: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(inner.get_submodule(parent), child, module)


# What reads head counts or has one entry a head


def _set_head_attribute(attention: nn.Module, attribute: str, value: int) -> None:
    """Set a head count; one that attention reads from the shared config is set in a view of the config."""
    if attribute.startswith("config."):
        vars(attention)["config"] = ConfigView(attention.config, {attribute.removeprefix("config."): value})
    else:
        setattr(attention, attribute, value)


class ConfigView:
    """A config with values of one module's own; all others are read from the shared config when they are asked for."""

    def __init__(self, shared: Any, own: dict[str, Any]) -> None:
        self.__dict__.update(own)
        self.__dict__["shared"] = shared

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "shared" not in self.__dict__:  # while it is copied
            raise AttributeError(name)
        return getattr(self.shared, name)


class KeptEntries:
    """What stays of one dimension of a tensor. Follows it to its device; no buffer, so in no state dict."""

    def __init__(self, index: Tensor, dim: int = -1) -> None:
        self.index, self.dim = index, dim

    def of(self, states: Tensor) -> Tensor:
        """[..., all, ...] -> [..., those that stay, ...]."""
        index = self.index.to(states.device)
        self.index = index
        return states.index_select(self.dim, index)


class SelectedChannels(nn.Module):
    """A norm over all heads of the dense model, then the channels of the heads that stay."""

    def __init__(self, norm: nn.Module, index: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.kept = KeptEntries(index)

    def forward(self, states: Tensor) -> Tensor:
        """[..., heads * head_dim] -> [..., kept heads * head_dim]."""
        return self.kept.of(self.norm(states))


def _stacks_apart(plan: PrunePlan) -> set[str | None]:
    """Stacks whose blocks hand on what has one entry a head, and of which one lost heads; by their position table."""
    return {spec.position_bias for spec, kept in plan.parts if spec.shared_arguments and len(kept.heads) < spec.heads}


def _stop_sharing(attention: Any, spec: BlockSpec, kept: BlockPlan, tables: dict[str, Any]) -> None:
    """Let a block make what it took over from the block before, and look up the biases of its own heads."""
    change_arguments(attention, dict.fromkeys(spec.shared_arguments, _nothing))
    if spec.position_bias:
        attention.has_relative_attention_bias = True
        name = spec.position_bias.rpartition(".")[2]
        table, heads = tables[spec.position_bias], KeptEntries(torch.tensor(kept.heads))
        if spec.position_bias.startswith(f"{spec.attention}."):
            table.register_forward_hook(_KeepOutput(heads))
        else:
            setattr(attention, name, SharedBiases(table, heads))


class SharedBiases(nn.Module):
    """A block's own columns of the table of relative position biases that another block of the stack holds."""

    table: nn.Embedding

    def __init__(self, table: nn.Embedding, heads: KeptEntries) -> None:
        super().__init__()
        vars(self)["table"] = table  # no part of this module, so that it is counted, saved and moved once
        self.heads = heads

    @property
    def weight(self) -> Tensor:
        """[buckets, kept heads]."""
        return self.heads.of(self.table.weight)

    def forward(self, buckets: Tensor) -> Tensor:
        """[queries, keys] -> [queries, keys, kept heads]."""
        return functional.embedding(buckets, self.weight)


class _KeepOutput:
    """Forward hook that keeps a part of what a module gives."""

    def __init__(self, kept: KeptEntries) -> None:
        self.kept = kept

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.kept.of(output)


def _nothing(of_dense_heads: Any) -> None:
    """What attention takes in place of an argument with one entry a dense head, so that it makes its own."""


# Attention without heads


def _drop_attention(inner: nn.Module, spec: BlockSpec, attention: nn.Module) -> None:
    """Replace attention without heads by a module that only adds the bias of the output projection."""
    output_name = spec.projections["o"]
    inside = output_name.startswith(f"{spec.attention}.")
    child = output_name[len(spec.attention) + 1 :] if inside else None
    stub = DroppedAttention(attention, child, spec.attention_outputs)
    table = (spec.position_bias or "").removeprefix(f"{spec.attention}.")
    if spec.position_bias and table != spec.position_bias:  # it belongs to the whole stack, and plans do not count it
        stub.add_module(table, attention.get_submodule(table))
    _replace(inner, spec.attention, stub)


class DroppedAttention(nn.Module):
    """Attention that lost all heads: no projection, no scores; what stays is the output projection's bias.

    The KV cache still counts the tokens of this layer (one channel of zeros a token), because lengths and positions
    are read from the cache of whichever layer comes first. Cross-attention counts nothing.
    """

    def __init__(self, attention: nn.Module, output: str | None, outputs: int = 2) -> None:
        super().__init__()
        self.layer_idx = getattr(attention, "layer_idx", getattr(attention, "layer_id", None))
        self.output_name = output
        self.outputs = outputs
        if output is not None:
            self.add_module(output, attention.get_submodule(output))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """[batch, length, width] -> ([batch, length, width of what follows], None, ...)."""
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is not None and kwargs.get("key_value_states") is None:
            counted = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            getattr(cache, "self_attention_cache", cache).update(counted, counted, self.layer_idx)
        nothing = hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
        if self.output_name is None:
            return nothing, *self._none()
        return self.get_submodule(self.output_name)(nothing), *self._none()

    def _none(self) -> tuple[None, ...]:
        return (None,) * (self.outputs - 1)


# The loss that balances experts


def _adapt_balance(inner: Any, plan: PrunePlan) -> None:
    """Keep transformers' load-balancing loss right, which adds up the routers' probabilities over layers and multiplies
    by the number of experts: as many as any layer keeps, and a logit of -inf for those that another has fewer."""
    counts = {spec.index: len(kept.experts) for spec, kept in plan.parts if spec.experts}
    if not counts:
        return
    most = max(counts.values())
    if hasattr(inner, "num_experts"):
        inner.num_experts = most
    for spec, _ in plan.parts:
        missing = most - counts.get(spec.index, most)
        if missing:
            router = inner.get_submodule(spec.expert_modules["router"])
            router.register_forward_hook(_PaddedLogits(missing), prepend=True)  # before transformers notes them


class _PaddedLogits:
    """Forward hook of a router: logits of -inf behind its own, for experts that other layers have."""

    def __init__(self, missing: int) -> None:
        self.missing = missing

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, *rest = output
        return functional.pad(logits, (0, self.missing), value=float("-inf")), *rest


# Generation that would read head counts from the shared config


def _adapt_generation(inner: Any, plan: PrunePlan) -> None:
    """Keep `generate` and its kin from counting on the heads of the dense model."""
    cut = [(spec, kept) for spec, kept in plan.parts if len(kept.heads) < spec.heads]
    if cut:
        grow_static_cache(inner)
    if any(0 < len(kept.kv_heads) < spec.kv_heads for spec, kept in cut):
        inner.init_continuous_batching = _no_continuous_batching
    settings = getattr(inner, "generation_config", None)
    if settings is not None and any(spec.neurons == 0 for spec, _ in cut):
        # numbers of cross-attention heads of the dense model, for the timestamps of Whisper's tokens
        vars(settings).pop("alignment_heads", None)


def _no_continuous_batching(*args: Any, **kwargs: Any) -> Any:
    raise LightPeftError(
        "continuous batching caches equally many KV heads in every layer, which a model with pruned KV heads does not "
        "have; use generate()"
    )
