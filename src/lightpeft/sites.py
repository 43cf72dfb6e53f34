"""One view of the PEFT modules of a live model: down and up projection, rank, scaling, and how to cut them.

All that lightpeft knows of PEFT's classes is here. Modules are found by type, never by their names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightpeft.errors import LightPeftError, require
from lightpeft.structure import BlockSpec, SiteSpec

_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga", "mica")
"""LoRA initialisations that write to the base weights."""
_UNSUPPORTED = (
    "use_dora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
"""LoRA settings that change what a module computes or where it sits in a way the site view does not know."""


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def base_layer(module: nn.Module) -> nn.Module:
    """The frozen layer inside a PEFT module, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def base_linear(model: nn.Module, name: str) -> nn.Linear:
    """The frozen linear layer `name` of a transformers model, or of the one inside a PeftModel."""
    return cast(nn.Linear, base_layer(transformers_model(model).get_submodule(name)))


@dataclass(frozen=True)
class Site:
    """One live LoRA module on a linear layer of a prunable block."""

    spec: SiteSpec
    layer: LoraLinear
    adapter: str

    @property
    def down(self) -> nn.Parameter:
        """A, [rank, in]."""
        return self.layer.lora_A[self.adapter].weight

    @property
    def up(self) -> nn.Parameter:
        """B, [out, rank]."""
        return self.layer.lora_B[self.adapter].weight

    @property
    def delta(self) -> nn.Module:
        """The module whose output times `scaling` is what the PEFT module adds."""
        return self.layer.lora_B[self.adapter]

    @property
    def base(self) -> nn.Module:
        """The frozen layer."""
        return self.layer.get_base_layer()

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.layer.scaling[self.adapter]

    def keep_inputs(self, index: Tensor) -> None:
        """Keep these input features of A."""
        slice_linear(self.layer.lora_A[self.adapter], index, dim=1)
        self.layer.in_features = len(index)

    def keep_outputs(self, index: Tensor) -> None:
        """Keep these output features of B."""
        slice_linear(self.layer.lora_B[self.adapter], index, dim=0)
        self.layer.out_features = len(index)

    def keep_ranks(self, index: Tensor) -> None:
        """Keep these ranks; alpha shrinks with the rank, so that the scaling stays to the last bit."""
        slice_linear(self.layer.lora_A[self.adapter], index, dim=0)
        slice_linear(self.layer.lora_B[self.adapter], index, dim=1)
        rank = len(index)
        self.layer.r[self.adapter] = rank
        divisor = math.sqrt(rank) if self.layer.use_rslora[self.adapter] else rank
        self.layer.lora_alpha[self.adapter] = _exact_alpha(self.scaling, divisor)

    def restart(self) -> None:
        """Re-initialise A and B as PEFT does, so that the module adds nothing again."""
        self.layer.reset_lora_parameters(self.adapter, init_lora_weights=True)


def slice_linear(linear: nn.Linear, index: Tensor, dim: int) -> None:
    """Keep output features (`dim` 0) or input features (`dim` 1) of a linear layer; the rest is freed."""
    index = index.to(linear.weight.device)
    linear.weight = _sliced(linear.weight, index, dim)
    if dim == 0:
        linear.out_features = len(index)
        if linear.bias is not None:
            linear.bias = _sliced(linear.bias, index, 0)
    else:
        linear.in_features = len(index)


def _sliced(parameter: Tensor, index: Tensor, dim: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(dim, index), requires_grad=parameter.requires_grad)


def _exact_alpha(scaling: float, divisor: float) -> float:
    """The float alpha with `alpha / divisor == scaling`, as PEFT will compute it; the nearest if there is none."""
    near = scaling * divisor
    candidates = [near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)]
    alpha = min(candidates, key=lambda candidate: abs(candidate / divisor - scaling))
    return int(alpha) if alpha.is_integer() else alpha


def lora_config(model: PeftModel) -> LoraConfig:
    """The configuration of the active adapter."""
    return model.peft_config[model.active_adapter]


def check_peft(model: nn.Module) -> None:
    """Refuse what cannot be pruned correctly.

    Raises:
        LightPeftError: not a PeftModel, an unsupported PEFT type or LoRA variant, merged weights, or several adapters.
    """
    if not isinstance(model, PeftModel):
        raise LightPeftError(f"expected a PeftModel from peft.get_peft_model, got a {type(model).__name__}")
    names = list(model.peft_config)
    require(len(names) == 1, f"the model has adapters {', '.join(names)}; lightpeft prunes one adapter at a time")
    config = model.peft_config[names[0]]
    if config.peft_type != PeftType.LORA:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise LightPeftError(f"PEFT type {kind} is not supported; use LoRA (peft.LoraConfig)")
    _check_variant(config)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    require(
        not any(layer.merged for layer in layers), "the LoRA weights are merged; call model.unmerge_adapter() first"
    )


def _check_variant(config: LoraConfig) -> None:
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise LightPeftError(f'init_lora_weights="{start}" changes the base weights; use True, "gaussian" or "eva"')
    require(config.bias == "none", f'LoRA bias="{config.bias}" trains biases of the base; use bias="none"')
    for name in _UNSUPPORTED:
        require(not getattr(config, name, None), f"LoRA with {name} is not supported; use plain LoRA or rsLoRA")


def find_sites(model: PeftModel, blocks: Sequence[BlockSpec]) -> list[Site]:
    """The LoRA modules on projections of the blocks, in the order of blocks and slots.

    LoRA elsewhere (embeddings, a language-model head) is left alone and is not listed.

    Raises:
        LightPeftError: no LoRA module sits on a prunable projection.
    """
    modules = dict(transformers_model(model).named_modules())
    sites = []
    for block in blocks:
        for slot, name in block.projections.items():
            layer = modules.get(name)  # None where attention was dropped
            if isinstance(layer, LoraLinear) and model.active_adapter in layer.lora_A:
                rank = layer.r[model.active_adapter]
                sites.append(Site(SiteSpec(name, rank, block.index, slot), layer, model.active_adapter))
    known = ", ".join(name.rpartition(".")[2] for name in blocks[0].projections.values())
    require(bool(sites), f"no LoRA module sits on a prunable projection; target_modules may name: {known}")
    return sites


def remove_site(model: PeftModel, name: str) -> None:
    """Put the frozen layer back where the PEFT module was."""
    inner = transformers_model(model)
    parent, _, child = name.rpartition(".")
    setattr(inner.get_submodule(parent), child, base_layer(inner.get_submodule(name)))


def refresh_config(model: PeftModel) -> None:
    """Make the PEFT configuration say exactly which modules there are, with their ranks and alphas."""
    inner, adapter, config = transformers_model(model), model.active_adapter, lora_config(model)
    layers = {
        name: module
        for name, module in inner.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.r and module.r[adapter] > 0
    }
    config.target_modules = sorted(layers)
    config.exclude_modules = None
    config.layers_to_transform = config.layers_pattern = None
    config.rank_pattern = {name: layer.r[adapter] for name, layer in layers.items() if layer.r[adapter] != config.r}
    config.alpha_pattern = {
        name: layer.lora_alpha[adapter]
        for name, layer in layers.items()
        if layer.lora_alpha[adapter] != config.lora_alpha
    }
    model.base_model.targeted_module_names = sorted(layers)


def restart_sites(sites: Sequence[Site], seed: int) -> None:
    """Re-initialise the PEFT modules, reproducibly."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for site in sites:
            site.restart()
