"""Repairs of model code that relies on all heads and experts of the dense model, after a cut.

They concern head counts that attention reads, arguments with one entry per head, shared position biases, attention
without heads, the load-balancing loss of experts, and generation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache

from lightpeft.compat.transformers import grow_static_cache
from lightpeft.errors import LightPeftError
from lightpeft.models.arguments import change_arguments
from lightpeft.models.families.spec import Family
from lightpeft.plans.block_plan import BlockPlan
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.plans.structure import BlockSpec

# What reads head counts or has one entry a head


def set_head_attribute(attention: nn.Module, attribute: str, value: int) -> None:
    """Set a head count of attention; a count that it reads from the shared config is set in a view of the config."""
    if attribute.startswith("config."):
        vars(attention)["config"] = ConfigView(attention.config, {attribute.removeprefix("config."): value})
    else:
        setattr(attention, attribute, value)


class ConfigView:
    """View of a shared config with some values that belong to one module."""

    def __init__(self, shared: Any, own: dict[str, Any]) -> None:
        self.__dict__.update(own)
        self.__dict__["shared"] = shared

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "shared" not in self.__dict__:  # while it is copied
            raise AttributeError(name)
        return getattr(self.shared, name)


class KeptEntries:
    """Selection of kept entries along one dimension of tensors.

    The index follows the tensors to their device. It is no buffer, so it is in no state dict.
    """

    def __init__(self, index: Tensor, dim: int = -1) -> None:
        self.index, self.dim = index, dim

    def of(self, states: Tensor) -> Tensor:
        """Select the kept entries: [..., all, ...] -> [..., kept, ...]."""
        index = self.index.to(states.device)
        self.index = index
        return states.index_select(self.dim, index)


class SelectedChannels(nn.Module):
    """A norm over all heads of the dense model, followed by a selection of the kept heads' channels."""

    def __init__(self, norm: nn.Module, index: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.kept = KeptEntries(index)

    def forward(self, states: Tensor) -> Tensor:
        """[..., heads * head_dim] -> [..., kept heads * head_dim]."""
        return self.kept.of(self.norm(states))


def unshared_tables(inner: nn.Module, plan: PrunePlan) -> dict[str | None, nn.Module | None]:
    """Find the position tables of stacks whose blocks cannot share arguments per head, because one lost heads.

    Returns:
        Name of the table -> table; None -> None for stacks that share other arguments and have no table.
    """
    names = {spec.position_bias for spec, kept in plan.parts if spec.shared_arguments and len(kept.heads) < spec.heads}
    return {name: inner.get_submodule(name) if name else None for name in names}


def stop_sharing(attention: Any, spec: BlockSpec, kept: BlockPlan, table: Any, family: Family) -> None:
    """Make a block compute its shared arguments itself, and look up the position biases of its own heads."""
    change_arguments(attention, dict.fromkeys(spec.shared_arguments, _drop_argument))
    if spec.position_bias and family.own_bias:
        setattr(attention, family.own_bias, True)
        heads = KeptEntries(torch.tensor(kept.heads))
        if spec.position_bias.startswith(f"{spec.attention}."):
            table.register_forward_hook(_KeepOutput(heads))
        else:
            setattr(attention, spec.position_bias.rpartition(".")[2], SharedBiases(table, heads))


class SharedBiases(nn.Module):
    """Columns of a block's kept heads in the table of relative position biases that another block holds."""

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
    """Forward hook that selects kept entries of a module's output."""

    def __init__(self, kept: KeptEntries) -> None:
        self.kept = kept

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.kept.of(output)


def _drop_argument(of_dense_heads: Any) -> None:
    """Replace an argument with one entry per dense head by None, so that attention computes its own."""


# Attention without heads


def drop_attention(inner: nn.Module, spec: BlockSpec, attention: nn.Module) -> None:
    """Replace attention without heads by a module that only adds the bias of the output projection."""
    output_name = spec.projections["o"]
    inside = output_name.startswith(f"{spec.attention}.")
    child = output_name[len(spec.attention) + 1 :] if inside else None
    stub = DroppedAttention(attention, child, spec.attention_outputs)
    table = (spec.position_bias or "").removeprefix(f"{spec.attention}.")
    if spec.position_bias and table != spec.position_bias:  # the whole stack uses the table, and plans do not count it
        stub.add_module(table, attention.get_submodule(table))
    inner.set_submodule(spec.attention, stub)


class DroppedAttention(nn.Module):
    """Attention that lost all heads: it adds only the bias of the output projection.

    The KV cache still counts the tokens of this layer (one channel of zeros per token), because transformers reads
    lengths and positions from the cache of the first layer. Cross-attention counts nothing.
    """

    def __init__(self, attention: nn.Module, output: str | None, outputs: int) -> None:
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
            return nothing, *self._no_weights()
        return self.get_submodule(self.output_name)(nothing), *self._no_weights()

    def _no_weights(self) -> tuple[None, ...]:
        return (None,) * (self.outputs - 1)


# The loss that balances experts


def adapt_balance(inner: Any, plan: PrunePlan) -> None:
    """Keep transformers' load-balancing loss correct where layers keep different numbers of experts.

    The loss sums the routers' probabilities over layers and multiplies by the number of experts. Here that is the
    largest number of any layer, and routers of layers with fewer experts get logits of -inf for the missing ones.
    """
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
            router.register_forward_hook(_PadLogits(missing), prepend=True)  # before transformers notes them


class _PadLogits:
    """Forward hook of a router that appends logits of -inf for experts that only other layers have."""

    def __init__(self, missing: int) -> None:
        self.missing = missing

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, *rest = output
        return functional.pad(logits, (0, self.missing), value=float("-inf")), *rest


# Generation that would read head counts from the shared config


def adapt_generation(inner: Any, plan: PrunePlan, family: Family) -> None:
    """Make `generate` and related methods independent of the dense model's number of heads."""
    cut = [(spec, kept) for spec, kept in plan.parts if len(kept.heads) < spec.heads]
    if cut:
        grow_static_cache(inner)
    if any(0 < len(kept.kv_heads) < spec.kv_heads for spec, kept in cut):
        inner.init_continuous_batching = _no_continuous_batching
    settings = getattr(inner, "generation_config", None)
    if settings is not None and any(spec.role == "cross" for spec, _ in cut):
        for name in family.head_settings:
            vars(settings).pop(name, None)


def _no_continuous_batching(*args: Any, **kwargs: Any) -> Any:
    raise LightPeftError(
        "continuous batching needs equally many KV heads in every layer, and this model has pruned KV heads; "
        "use generate()"
    )
