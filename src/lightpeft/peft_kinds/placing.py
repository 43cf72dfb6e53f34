"""Placement of a run's PEFT modules on a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from lightpeft.config import RunConfig
from lightpeft.errors import require
from lightpeft.files.foreign import parsing
from lightpeft.models.families.family_table import block_specs
from lightpeft.models.loading import LoadedModel
from lightpeft.peft_kinds.kinds import ModulePlaces, kind_named
from lightpeft.peft_kinds.sites.live_sites import leave_experts
from lightpeft.plans.structure import BlockSpec


def add_peft(loaded: LoadedModel, config: RunConfig) -> PeftModel:
    """Put the run's PEFT modules on a model.

    They sit on all projections of the blocks that may keep modules (`light.remove.depth`, `light.modules.blocks`); with
    method plain on the customary projections of every block; or on target modules in the run's settings.

    Raises:
        LightPeftError: slots are unknown, target modules match nothing, the family lacks a place, or the checkpoint has
            no weights for the blocks.
    """
    blocks = block_specs(loaded.model)
    _check_weights(loaded, blocks)
    kind, task_type = kind_named(config.peft_type), loaded.head.task_type
    made = kind.config(
        config, _module_places(blocks, config, loaded.model.config.model_type), task_type, loaded.new_modules
    )
    _check_targets(loaded.model, made.target_modules, blocks)
    with parsing(f"PEFT cannot put {kind.title} on {loaded.model.config.model_type}"):
        model = get_peft_model(loaded.model, made)
    if config.method_spec.prunes:
        leave_experts(model, blocks)
    return model


def _module_places(blocks: Sequence[BlockSpec], config: RunConfig, model_type: str) -> ModulePlaces:
    """Return the blocks that may have modules: if the method prunes, those that may keep them, else all."""
    if config.method_spec.prunes:
        return ModulePlaces.under(config.light, blocks, model_type)
    return ModulePlaces(blocks, (), model_type, config.method_spec.by_habit)


def _check_targets(model: PreTrainedModel, targets: Any, blocks: Sequence[BlockSpec]) -> None:
    """Check that the model has at least one of the target modules."""
    if not targets or isinstance(targets, str):
        return
    ends = tuple(f".{name}" for name in targets)
    names = sorted({name.rpartition(".")[2] for name in blocks[0].projections.values()})
    require(
        any(f".{name}".endswith(ends) for name, _ in model.named_modules()),
        f"target_modules {sorted(targets)} match nothing in {model.config.model_type}; "
        f"choose projections of a block: {', '.join(names)}",
    )


def _check_weights(loaded: LoadedModel, blocks: Sequence[BlockSpec]) -> None:
    """Refuse a base whose blocks have random weights, because PEFT needs pretrained ones."""
    for name in (name for block in blocks for name in block.projections.values()):
        random = any(name.startswith(f"{module}.") for module in loaded.new_modules)
        require(
            not random,
            f"the checkpoint has no weights for {name}; give one of architecture {loaded.model.config.model_type}",
        )
