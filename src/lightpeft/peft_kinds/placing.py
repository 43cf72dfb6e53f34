"""Where a run puts its PEFT modules on a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model

from lightpeft.config import Head, RunConfig
from lightpeft.errors import LightPeftError, require
from lightpeft.models.families import block_specs
from lightpeft.models.loading import LoadedModel
from lightpeft.peft_kinds.bottleneck import BottleneckConfig
from lightpeft.plans.structure import SLOTS, BlockSpec

_TASK_TYPES: dict[Head, TaskType | None] = {
    "classification": TaskType.SEQ_CLS,
    "regression": TaskType.SEQ_CLS,
    "multiple-choice": None,
    "span": TaskType.QUESTION_ANS,
    "causal-lm": TaskType.CAUSAL_LM,
}
"""What PEFT calls a model with a head; None: it has no name for it, and passes inputs on as they are."""


def peft_task_type(head: Head) -> TaskType | None:
    """What PEFT calls a model with that head; None: it has no name for it."""
    return _TASK_TYPES[head]


def add_peft(loaded: LoadedModel, config: RunConfig) -> PeftModel:
    """Put the run's PEFT modules on a model.

    LoRA sits on all projections of the blocks in which modules may stay (`light.depth`, `light.module_blocks`) or, with
    method plain, on q and v of every block as it is used by habit.

    Raises:
        LightPeftError: unknown slots, target modules that match nothing, or a place that the family does not have; or
            the checkpoint had no weights for the blocks.
    """
    blocks = block_specs(loaded.model)
    _check_weights(loaded, blocks)
    lowest, end = 0, len(blocks)
    if config.way.prunes:
        end = config.light.blocks_left(len(blocks))
        lowest = config.light.first_module_block(end)
    common: dict[str, Any] = {"task_type": _TASK_TYPES[loaded.head], "modules_to_save": loaded.new_modules or None}
    if config.peft == "bottleneck":
        others = [name for block in (*blocks[:lowest], *blocks[end:]) for name in block.projections.values()]
        adapters = BottleneckConfig(**asdict(config.bottleneck), exclude_modules=others or None, **common)
        return get_peft_model(loaded.model, adapters)
    targets = config.lora.target_modules or _slot_targets(blocks[lowest:end], config)
    lora = LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=targets,
        **common,
    )
    try:
        return get_peft_model(loaded.model, lora)
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name in blocks[0].projections.values()})
        raise LightPeftError(
            f"lora.target_modules {targets} match nothing in {loaded.model.config.model_type}; "
            f"projections of a block: {', '.join(names)}"
        ) from error


def _check_weights(loaded: LoadedModel, blocks: Sequence[BlockSpec]) -> None:
    """Refuse a base whose blocks were left at random: PEFT trains on what a checkpoint brings."""
    for name in (name for block in blocks for name in block.projections.values()):
        random = any(name.startswith(f"{module}.") for module in loaded.new_modules)
        require(
            not random,
            f"the checkpoint has no weights for {name}; is {loaded.model.config.model_type} really its architecture?",
        )


def _slot_targets(blocks: Sequence[BlockSpec], config: RunConfig) -> list[str]:
    unknown = set(config.lora.slots or ()) - set(SLOTS)
    require(not unknown, f"lora.slots has {', '.join(sorted(unknown))}; slots are {', '.join(SLOTS)}")
    slots = config.lora.slots or config.way.slots or SLOTS
    return [name for block in blocks for slot, name in block.projections.items() if slot in slots]
