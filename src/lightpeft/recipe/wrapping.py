"""PEFT modules in the blocks that the settings allow, on a model of any trainer."""

from __future__ import annotations

import copy
import logging
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from lightpeft.config import LightConfig
from lightpeft.errors import LightPeftError, one_line, require
from lightpeft.models.families.family_table import block_specs
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.kinds import ModulePlaces, kind_of, projections
from lightpeft.peft_kinds.sites.live_sites import find_sites, own_adapter, refresh_config, remove_site
from lightpeft.prune.discovery import ensure_family

_log = logging.getLogger(__name__)
_PLACES = ("target_modules", "exclude_modules", "feedforward_modules")
"""Fields of PEFT's configurations that say where modules go."""
_HEADS = ("classifier", "score", "qa_outputs")
"""Names of heads for labels and spans; PEFT trains and saves these by itself if the configuration has a `task_type`."""


def inner_peft_model(model: nn.Module) -> PeftModel:
    """Return the PeftModel that a trainer's model is, or contains (an embedding model of sentence-transformers).

    Raises:
        LightPeftError: the model contains none, or several.
    """
    found = [module for module in model.modules() if isinstance(module, PeftModel)]
    require(
        len(found) == 1,
        f"{type(model).__name__} contains {len(found) or 'no'} PeftModel, and exactly one is needed; pass a model from "
        "peft.get_peft_model, or a dense one with peft_config=",
    )
    return found[0]


def add_peft_modules(model: nn.Module, config: PeftConfig, light: LightConfig, **options: Any) -> nn.Module:
    """Put PEFT modules on a dense model, in the blocks that `light.modules.blocks` allows.

    Args:
        model: a transformers model, or a module that contains one, which the PeftModel then replaces.
        options: keyword arguments of `get_peft_model`.

    Returns:
        The PeftModel, or the module that contains it.

    Raises:
        LightPeftError: the model contains no transformers model, or PEFT cannot make the modules.
    """
    require(
        not any(isinstance(module, PeftModel) for module in model.modules()),
        "the model has PEFT modules already; leave peft_config= out",
    )
    if isinstance(model, PreTrainedModel):
        return _make_peft_model(model, config, light, **options)
    inner = next((name for name, module in model.named_modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        raise LightPeftError(f"{type(model).__name__} contains no transformers model; PEFT modules need one")
    parent, _, attribute = inner.rpartition(".")
    wrapped = _make_peft_model(model.get_submodule(inner), config, light, **options)
    setattr(model.get_submodule(parent), attribute, wrapped)
    return model


def _make_peft_model(model: nn.Module, config: PeftConfig, light: LightConfig, **options: Any) -> PeftModel:
    allowed = with_allowed_modules(config, model, light)
    try:
        return get_peft_model(model, allowed, **options)
    except (ValueError, AttributeError) as error:
        hint = f"light.modules.blocks allows them in {light.modules.blocks or 1:.0%} of the blocks, the upper ones"
        if isinstance(error, AttributeError):
            hint = f"task_type {config.task_type} may be that of another model"
        reason = f"{one_line(error)}; {hint}"
        raise LightPeftError(f"peft_config: PEFT cannot put its modules on the model: {reason}") from error


def with_allowed_modules(config: PeftConfig, model: nn.Module, light: LightConfig) -> PeftConfig:
    """Return a copy of a PEFT configuration whose modules lie in the blocks that `light.modules.blocks` allows.

    Without `target_modules` the modules go on all projections of these blocks (in mixtures of experts, on those that
    PEFT supports); else on the named ones, but in no other block.

    Raises:
        LightPeftError: `exclude_modules` is a pattern, to which blocks cannot be added.
    """
    ensure_family(model)
    inner = transformers_model(model)
    place = ModulePlaces.under(light, block_specs(inner), inner.config.model_type)
    named = {name: getattr(config, name) for name in _PLACES if hasattr(config, name)}
    changed = kind_of(config).placed(named, place)
    if named.get("target_modules") is not None and place.others:
        known = named.get("exclude_modules") or []
        pattern = isinstance(known, str)
        require(not pattern, "peft_config.exclude_modules is a pattern; use a list, or set light.modules.blocks to 1")
        changed["exclude_modules"] = [*known, *projections(place.others)]
    config = copy.copy(config)
    for name, value in changed.items():
        setattr(config, name, value)
    return config


def remove_disallowed_modules(model: PeftModel, light: LightConfig) -> None:
    """Remove the PEFT modules of blocks that `light.modules.blocks` does not allow, so that none is trained in vain.

    Modules in blocks that `light.remove.depth` drops go with their blocks.

    Raises:
        LightPeftError: no module would be left.
    """
    blocks = block_specs(transformers_model(model))
    lowest = light.first_module_block(light.blocks_left(len(blocks)))
    sites = find_sites(model, blocks)
    gone = [site for site in sites if (site.spec.block or 0) < lowest]
    require(
        len(gone) < len(sites),
        "no PEFT module is in the blocks that light.modules.blocks allows; raise it, or change target_modules",
    )
    if gone:
        for site in gone:
            remove_site(model, site)
        refresh_config(model)


def check_trainable(model: PeftModel) -> None:
    """Refuse a model whose weights are all frozen, and warn of a head that neither trains nor is saved.

    Raises:
        LightPeftError: no weight trains.
    """
    trains = any(parameter.requires_grad for parameter in model.parameters())
    way = "load it with is_trainable=True, and leave inference_mode out"
    require(trains, f"all weights of the adapter are frozen, so nothing would train; {way}")
    inner, config = transformers_model(model), model.peft_config[own_adapter(model)]
    head = next((name for name in _HEADS if hasattr(inner, name)), None)
    if head is None or config.task_type is not None or config.modules_to_save:
        return
    if not any(parameter.requires_grad for parameter in getattr(inner, head).parameters()):
        _log.warning(
            "the head (%s) does not train, and the adapter will not contain it: set task_type or modules_to_save in "
            "the PEFT configuration",
            head,
        )
