"""Search, removal and merging of the PEFT modules of a model, of any kind."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn

from lightpeft.compat.peft import NO_TARGETS, BaseTunerLayer, ParamWrapper, adapters_in
from lightpeft.errors import LightPeftError, require
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.sites.base import Site
from lightpeft.peft_kinds.sites.bottleneck import BottleneckSite
from lightpeft.peft_kinds.sites.dora import DoraSite
from lightpeft.peft_kinds.sites.ia3 import Ia3Site
from lightpeft.peft_kinds.sites.lora import LoraSite
from lightpeft.plans.structure import BlockSpec, SiteSpec

_log = logging.getLogger(__name__)

SITE_KINDS: tuple[type[Site], ...] = (DoraSite, LoraSite, Ia3Site, BottleneckSite)
"""PEFT kinds that can be pruned; the first one that matches a configuration counts."""
REFERENCE = "ref"
"""Name of the frozen copy of an adapter that TRL's trainers add to a PeftModel as their reference."""


def check_peft(model: nn.Module) -> None:
    """Check before training that a model can be pruned correctly.

    Raises:
        LightPeftError: the model is not a PeftModel, has an unsupported PEFT type or variant, several adapters, or
            merged or disabled ones.
    """
    if not isinstance(model, PeftModel):
        raise LightPeftError(f"{type(model).__name__} is not a PeftModel; pass a model from peft.get_peft_model")
    nested = isinstance(model.get_base_model(), PeftModel)
    require(not nested, "the PeftModel contains another PeftModel; merge or unload the inner adapter first")
    own_adapter(model)
    layers = _tuner_layers(model)
    check_config(_config(model))
    merged = any(layer.merged for layer in layers)
    require(not merged, "the PEFT weights are merged; call model.unmerge_adapter() first")
    disabled = any(layer.disable_adapters for layer in layers)
    require(not disabled, "the PEFT modules are disabled; call model.enable_adapter_layers() first")


def own_adapter(model: PeftModel) -> str:
    """Return the name of a model's only adapter; the reference of TRL's trainers does not count.

    Raises:
        LightPeftError: the model has several adapters.
    """
    in_layers = (name for layer in _tuner_layers(model) for name in adapters_in(layer))
    names = list(dict.fromkeys([*model.peft_config, *in_layers]))
    own = [name for name in names if name != REFERENCE] or names
    several = f"the model has several adapters ({', '.join(names)}), and lightpeft prunes and saves one"
    require(len(own) == 1, f"{several}; remove the others with delete_adapter()")
    return own[0]


def drop_reference(model: PeftModel) -> None:
    """Remove the reference adapter of TRL's trainers from a model; the next trainer makes its own."""
    if REFERENCE in model.peft_config and own_adapter(model) != REFERENCE:
        model.delete_adapter(REFERENCE)


def adapter_in_use(model: nn.Module) -> Callable[[], bool]:
    """Return a function that tells whether the model computes with the adapter that is active now.

    TRL's trainers compute their reference on the same model, with its adapter disabled or a frozen copy in its place.
    For a model without PEFT the function always returns True.
    """
    layer = next(iter(_tuner_layers(model)), None)
    return partial(_has_setting, layer, _adapter_setting(layer))


def _has_setting(layer: BaseTunerLayer | None, setting: tuple[list[str], bool]) -> bool:
    return _adapter_setting(layer) == setting


def _adapter_setting(layer: BaseTunerLayer | None) -> tuple[list[str], bool]:
    """Return the active adapters of a module, and whether all are disabled."""
    return ([], False) if layer is None else (list(layer.active_adapters), layer.disable_adapters)


def _tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def find_sites(model: PeftModel, blocks: Sequence[BlockSpec]) -> list[Site]:
    """Find the PEFT modules on projections of the blocks, in the order of blocks and slots.

    PEFT modules elsewhere (on embeddings, a language-model head) are not listed, and never changed.

    Raises:
        LightPeftError: no PEFT module is on a prunable projection.
    """
    kind, adapter = _kind(model), model.active_adapter
    modules = dict(transformers_model(model).named_modules())
    sites: list[Site] = []
    for block in blocks:
        for slot, name in block.projections.items():
            layer = modules.get(name)  # None if attention was dropped
            rank = kind.rank_of(layer, adapter) if isinstance(layer, kind.layer_type) else 0
            if rank:
                sites.append(kind(SiteSpec(name, rank, block.index, slot), layer, adapter))
    known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in blocks[0].projections.values()))
    require(bool(sites), f"no PEFT module is on a prunable projection; give target_modules among {known}")
    return sites


def leave_experts(model: PeftModel, blocks: Sequence[BlockSpec]) -> None:
    """Remove LoRA from routed experts and their routers if PEFT added it by itself ("all-linear"), with a warning.

    LoRA on parameters that the user listed, or that has been trained, stays, and `check_peft` refuses it.
    """
    inner, named = transformers_model(model), {*(getattr(_config(model), "target_parameters", None) or ())}
    wrapped: dict[str, list[ParamWrapper]] = {}
    by_peft: set[str] = set()
    for block in (block for block in blocks if block.experts):
        for part, name in block.expert_modules.items():
            layer, last = inner.get_submodule(name), name.rpartition(".")[2]
            while isinstance(layer, ParamWrapper):
                wrapped.setdefault(name, []).append(layer)
                by_peft.add(f"{last}.{layer.parameter_name}" if part == "router" else layer.parameter_name)
                layer = layer.base_layer
    layers = [layer for of_one in wrapped.values() for layer in of_one]
    trained = any(_is_trained(up.weight) for layer in layers for up in layer.lora_B.values())
    if not wrapped or trained or named - by_peft:
        return
    for name, of_one in wrapped.items():
        inner.set_submodule(name, of_one[-1].base_layer)
    refresh_config(model)
    what = "LoRA was removed from %d modules of routed experts and routers (%s), because lightpeft cuts these"
    _log.warning(what, len(wrapped), next(iter(wrapped)))


def _is_trained(up: torch.Tensor) -> bool:
    """Return whether B is not zero, as it is at the start; without storage (in a rehearsal) it counts as untrained."""
    return not up.is_meta and bool(up.any())


def remove_site(model: PeftModel, site: Site) -> None:
    """Replace a PEFT module by its frozen layer."""
    transformers_model(model).set_submodule(site.spec.name, site.layer.base_layer)


def merge_site(model: PeftModel, site: Site) -> None:
    """Merge a PEFT module into its layer, which gets a new weight, because other models may share the old one."""
    layer = site.layer.base_layer
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    site.layer.merge(adapter_names=[site.adapter])
    remove_site(model, site)


def refresh_config(model: PeftModel) -> None:
    """Set the PEFT configuration to the exact names and sizes of the model's PEFT modules."""
    kind, adapter, config = _kind(model), model.active_adapter, _config(model)
    layers = {
        name: module
        for name, module in transformers_model(model).named_modules()
        if isinstance(module, kind.layer_type) and kind.rank_of(module, adapter)
    }
    config.target_modules = sorted(layers)
    config.exclude_modules = None
    kind.refresh(config, layers, adapter)
    if not layers:
        config.target_modules = NO_TARGETS
    model.base_model.targeted_module_names = sorted(layers)


def simplify_config(config: PeftConfig) -> None:
    """Simplify the configuration of an adapter for programs that do not know PEFT's patterns."""
    _site_class(config).simplify(config)


def widens_alone(config: PeftConfig) -> bool:
    """Return whether an adapter of a cut model can be expanded to the dense base without the base's weights."""
    return not _site_class(config).needs_base


def _config(model: PeftModel) -> Any:
    """Return the configuration of the active adapter."""
    return model.peft_config[model.active_adapter]


def check_config(config: PeftConfig) -> None:
    """Check that modules of a PEFT configuration can be pruned correctly.

    Raises:
        LightPeftError: the type or a setting is not supported.
    """
    _site_class(config).check(config)


def _kind(model: PeftModel) -> type[Site]:
    return _site_class(_config(model))


def _site_class(config: PeftConfig) -> type[Site]:
    for kind in SITE_KINDS:
        if kind.matches(config):
            return kind
    name = getattr(config.peft_type, "value", config.peft_type)
    known = ", ".join(dict.fromkeys(kind.peft_type.value for kind in SITE_KINDS))
    raise LightPeftError(f"PEFT type {name} cannot be pruned; use one of {known}")
