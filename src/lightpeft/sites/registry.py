"""Finding the PEFT modules of a model, whatever their kind, and changing where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lightpeft.errors import LightPeftError, require
from lightpeft.sites.base import Site, base_layer, transformers_model
from lightpeft.sites.lora import LoraSite
from lightpeft.structure import BlockSpec, SiteSpec

KINDS: dict[str, type[Site]] = {kind.peft_type.value: kind for kind in (LoraSite,)}
"""PEFT kinds that can be pruned, by PEFT's name for them."""


def check_peft(model: nn.Module) -> None:
    """Refuse what cannot be pruned correctly.

    Raises:
        LightPeftError: not a PeftModel, an unsupported PEFT type or variant, merged weights, or several adapters.
    """
    if not isinstance(model, PeftModel):
        raise LightPeftError(f"expected a PeftModel from peft.get_peft_model, got a {type(model).__name__}")
    names = list(model.peft_config)
    require(len(names) == 1, f"the model has adapters {', '.join(names)}; lightpeft prunes one adapter at a time")
    _kind(model).check(_config(model))
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    require(
        not any(layer.merged for layer in layers), "the PEFT weights are merged; call model.unmerge_adapter() first"
    )


def find_sites(model: PeftModel, blocks: Sequence[BlockSpec]) -> list[Site]:
    """The PEFT modules on projections of the blocks, in the order of blocks and slots.

    PEFT modules elsewhere (on embeddings, a language-model head) are left alone and are not listed.

    Raises:
        LightPeftError: no PEFT module sits on a prunable projection.
    """
    kind, adapter = _kind(model), model.active_adapter
    modules = dict(transformers_model(model).named_modules())
    sites = []
    for block in blocks:
        for slot, name in block.projections.items():
            layer = modules.get(name)  # None where attention was dropped
            rank = kind.rank_of(layer, adapter) if isinstance(layer, kind.layer_type) else 0
            if rank:
                sites.append(kind(SiteSpec(name, rank, block.index, slot), layer, adapter))
    known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in blocks[0].projections.values()))
    require(
        bool(sites), f"no {kind.peft_type.value} module sits on a prunable projection; target_modules may name: {known}"
    )
    return sites


def remove_site(model: PeftModel, site: Site) -> None:
    """Put the frozen layer back where the PEFT module was."""
    site.removed()
    inner = transformers_model(model)
    parent, _, child = site.spec.name.rpartition(".")
    setattr(inner.get_submodule(parent), child, base_layer(site.layer))


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
    model.base_model.targeted_module_names = sorted(layers)


def restart_sites(sites: Sequence[Site], seed: int) -> None:
    """Re-initialise the PEFT modules, reproducibly."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for site in sites:
            site.restart()


def _config(model: PeftModel) -> Any:
    """The configuration of the active adapter."""
    return model.peft_config[model.active_adapter]


def _kind(model: PeftModel) -> type[Site]:
    peft_type = _config(model).peft_type
    name = getattr(peft_type, "value", peft_type)
    if name not in KINDS:
        raise LightPeftError(f"PEFT type {name} is not supported; supported: {', '.join(sorted(KINDS))}")
    return KINDS[name]
