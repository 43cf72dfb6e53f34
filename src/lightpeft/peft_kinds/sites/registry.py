"""Finding the PEFT modules of a model, whatever their kind, and changing where they are."""

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
"""PEFT kinds that can be pruned; the first that matches a configuration is taken."""
REFERENCE = "ref"
"""What TRL's trainers call the frozen copy of an adapter that they add to a PeftModel, as their reference."""


def check_peft(model: nn.Module) -> None:
    """Refuse what cannot be pruned correctly; call it before training.

    Raises:
        LightPeftError: not a PeftModel, an unsupported PEFT type or variant, several adapters, merged or disabled ones.
    """
    if not isinstance(model, PeftModel):
        raise LightPeftError(f"expected a PeftModel from peft.get_peft_model, got a {type(model).__name__}")
    nested = isinstance(model.get_base_model(), PeftModel)
    require(not nested, "there is a PeftModel inside the PeftModel; lightpeft prunes one adapter at a time")
    own_adapter(model)
    layers = _tuner_layers(model)
    check_config(_config(model))
    merged = any(layer.merged for layer in layers)
    require(not merged, "the PEFT weights are merged; call model.unmerge_adapter() first")
    disabled = any(layer.disable_adapters for layer in layers)
    require(not disabled, "the PEFT modules are disabled; call model.enable_adapter_layers() first")


def own_adapter(model: PeftModel) -> str:
    """The name of a model's one adapter; beside it there may be the reference of one of TRL's trainers.

    Raises:
        LightPeftError: there are several.
    """
    in_layers = (name for layer in _tuner_layers(model) for name in adapters_in(layer))
    names = list(dict.fromkeys([*model.peft_config, *in_layers]))
    own = [name for name in names if name != REFERENCE] or names
    several = f"the model has adapters {', '.join(names)}; lightpeft prunes, and saves, one adapter at a time"
    require(len(own) == 1, f"{several}: delete_adapter() the others")
    return own[0]


def drop_reference(model: PeftModel) -> None:
    """Take the reference of one of TRL's trainers out of a model; the next makes one of the model that it is given."""
    if REFERENCE in model.peft_config and own_adapter(model) != REFERENCE:
        model.delete_adapter(REFERENCE)


def adapter_in_use(model: nn.Module) -> Callable[[], bool]:
    """What tells whether a forward pass computes with the adapter as it is now; without one, it always does.

    TRL's trainers compute their reference on the same model, with its adapter off or a frozen copy in its place.
    """
    layer = next(iter(_tuner_layers(model)), None)
    return partial(_computes_with, layer, _setting(layer))


def _computes_with(layer: BaseTunerLayer | None, setting: tuple[list[str], bool]) -> bool:
    return _setting(layer) == setting


def _setting(layer: BaseTunerLayer | None) -> tuple[list[str], bool]:
    """The adapters that are active in a module, and whether all are off."""
    return ([], False) if layer is None else (list(layer.active_adapters), layer.disable_adapters)


def _tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def find_sites(model: PeftModel, blocks: Sequence[BlockSpec]) -> list[Site]:
    """The PEFT modules on projections of the blocks, in the order of blocks and slots.

    PEFT modules elsewhere (on embeddings, a language-model head) are left alone and are not listed.

    Raises:
        LightPeftError: no PEFT module sits on a prunable projection.
    """
    kind, adapter = _kind(model), model.active_adapter
    modules = dict(transformers_model(model).named_modules())
    sites: list[Site] = []
    for block in blocks:
        for slot, name in block.projections.items():
            layer = modules.get(name)  # None where attention was dropped
            rank = kind.rank_of(layer, adapter) if isinstance(layer, kind.layer_type) else 0
            if rank:
                sites.append(kind(SiteSpec(name, rank, block.index, slot), layer, adapter))
    known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in blocks[0].projections.values()))
    require(bool(sites), f"no PEFT module sits on a prunable projection; target_modules may name: {known}")
    return sites


def leave_experts(model: PeftModel, blocks: Sequence[BlockSpec]) -> None:
    """Take LoRA off routed experts and their routers where PEFT has put it by itself, as its "all-linear" does, and say
    so.

    Where somebody named their parameters, or LoRA there has been trained, it stays, for `check_peft` to refuse.
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
    what = "no LoRA on %d routed experts and routers (%s): lightpeft cuts them, and has none there"
    _log.warning(what, len(wrapped), next(iter(wrapped)))


def _is_trained(up: torch.Tensor) -> bool:
    """Whether a B is not zero, as all begin; one without storage is of a rehearsal."""
    return not up.is_meta and bool(up.any())


def remove_site(model: PeftModel, site: Site) -> None:
    """Put what is inside the PEFT module, the frozen layer, back where the module was."""
    transformers_model(model).set_submodule(site.spec.name, site.layer.base_layer)


def merge_site(model: PeftModel, site: Site) -> None:
    """Make the PEFT module part of its layer, which gets a new weight: the old one may be that of other models, too."""
    layer = site.layer.base_layer
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    site.layer.merge(adapter_names=[site.adapter])
    remove_site(model, site)


def refresh_config(model: PeftModel) -> None:
    """Make the PEFT configuration say exactly which modules there are, with their sizes."""
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
    """Say as plainly as possible which modules an adapter has: some of its readers do not know PEFT's patterns."""
    _site_class(config).simplify(config)


def widens_alone(config: PeftConfig) -> bool:
    """Whether an adapter of a cut model goes onto the dense one without a look at the base's weights."""
    return not _site_class(config).needs_base(config)


def _config(model: PeftModel) -> Any:
    """The configuration of the active adapter."""
    return model.peft_config[model.active_adapter]


def check_config(config: PeftConfig) -> None:
    """Refuse a PEFT configuration whose modules cannot be pruned correctly.

    Raises:
        LightPeftError: naming what of it cannot.
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
