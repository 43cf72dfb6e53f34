"""Pruned models without PEFT: what their config can say of them, and what has to stand beside their weights if not."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.errors import require
from lightpeft.files import file_checksum, replacing_folder, write_json
from lightpeft.models.families import family_of
from lightpeft.plans.records import PrunePlan

MERGED = "merged.json"
"""What says that the weights beside it belong into a model that a plan has cut."""


def check_mergeable(config: PretrainedConfig) -> None:
    """Raise `LightPeftError` where PEFT cannot be merged into a model without loss, by the model's config."""
    quantised = getattr(config, "quantization_config", None) is not None
    require(not quantised, "the base is quantised, and merging would round it again; keep the light adapter")


def settle(model: PreTrainedModel, plan: PrunePlan, facts: Mapping[str, Any]) -> None:
    """Make a pruned model without PEFT one that saves itself so that it can be loaded.

    It gets a config that says its widths; where its family has no words for them, `save_pretrained` writes as
    `save_whole` does, for `load_merged`.

    Args:
        facts: what `merged.json` is to say of it.
    """
    model.light_plan = plan
    native = native_config(model, plan)
    if native is not None:
        model.config = native
    else:
        model.save_pretrained = partial(save_whole, model, {**facts, "native": False})


def save_whole(
    model: PreTrainedModel,
    facts: Mapping[str, Any],
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str | None = None,
    alone: bool = False,
    is_main_process: bool = True,
    **options: Any,
) -> None:
    """Write what transformers saves, with `merged.json` and, if given, a tokenizer and a model card beside it.

    Args:
        alone: nothing else that is in the folder stays.
        options: of transformers' `save_pretrained`.

    Raises:
        LightPeftError: the weights are quantised, or the folder cannot be written; nothing is half-written.
    """
    check_mergeable(model.config)
    if not is_main_process:
        return
    with replacing_folder(folder, alone=alone) as temporary:
        type(model).save_pretrained(model, temporary, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        checksums = {file.name: file_checksum(file) for file in sorted(temporary.iterdir())}
        write_json(temporary / MERGED, {**facts, "checksums": checksums})


def native_config(whole: PreTrainedModel, plan: PrunePlan) -> PretrainedConfig | None:
    """A config that says how wide the layers of a pruned model are; None where its family has no words for that."""
    widths = list(per_layer_config(whole.config.model_type, plan).values())
    if not widths or any(of_layer != widths[0] for of_layer in widths):
        return None
    config = copy.deepcopy(whole.config)
    fewer_heads = len(plan.blocks[0].heads) < plan.specs[0].heads
    if fewer_heads and plan.specs[0].per_head_arguments:  # no config says which entries are those of the kept heads
        return None
    try:
        if fewer_heads:  # families that can have any size of heads read it even where their config has none
            config.head_dim = plan.specs[0].head_dim
        for name, value in widths[0].items():
            if hasattr(config, name):
                setattr(config, name, value)
        with torch.device("meta"):
            skeleton = type(whole)(copy.deepcopy(config))
    except (AttributeError, ValueError, ZeroDivisionError, RuntimeError):  # the family cannot have these widths
        return None
    return config if _shapes(skeleton) == _shapes(whole) else None


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def per_layer_config(model_type: str, plan: PrunePlan) -> dict[str, dict[str, int]]:
    """Widths of every block in the schema of transformers' `per_layer_config`: layer -> config key -> value."""
    stacks = family_of(model_type).stacks
    if len(stacks) > 1:  # the schema counts one stack of layers only
        return {}
    return {
        str(spec.index): {
            "num_attention_heads": len(kept.heads),
            "num_key_value_heads": len(kept.kv_heads),
            stacks[0].width_key or "intermediate_size": len(kept.neurons),
        }
        for spec, kept in plan.parts
    }
