"""Depth: a model without its top blocks, as if it had been made with fewer."""

from __future__ import annotations

import copy

import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lightpeft.errors import require
from lightpeft.models.families.registry import block_lists
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.sites.registry import refresh_config


def leave_out(model: nn.Module, stay: int) -> None:
    """Take all blocks but the lowest `stay` out of a transformers model, or the one inside a PeftModel, in place.

    A model that has no more than these stays as it is.

    What was above them (the last norm, the head) then reads their output. The config says so, so that generation,
    caches and `save_pretrained` take the model for one of that depth; PEFT modules go with their blocks.

    Raises:
        LightPeftError: the model has several stacks of blocks, of which one reads the other's output, or something
            beside the blocks that has a size by their number; nothing was taken out.
    """
    inner = transformers_model(model)
    stacks, kind = block_lists(inner), inner.config.model_type
    several = f"depth leaves out blocks of models with one stack, and {kind} has {len(stacks)}"
    require(len(stacks) == 1, f"{several}; set light.remove.depth to 0")
    if len(stacks[0]) <= stay:
        return
    _check_rest(inner, stay)
    del stacks[0][stay:]
    _set_depth(inner.config, stay)
    if isinstance(model, PeftModel):
        refresh_config(model)


def _set_depth(config: PretrainedConfig, blocks: int) -> None:
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    config.num_hidden_layers = blocks


def _check_rest(inner: PreTrainedModel, stay: int) -> None:
    """Refuse a model in which more than the list of blocks depends on how many there are."""
    config = copy.deepcopy(inner.config)
    _set_depth(config, stay)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in type(inner)(config).named_parameters()}
    # quantised weights, which are stored in other shapes, are integers
    own = {name: p.shape for name, p in inner.named_parameters() if p.is_floating_point()}
    other = [name for name in own.keys() & shapes.keys() if own[name] != shapes[name]]
    require(
        not other,
        f"{inner.config.model_type} cannot lose blocks: {', '.join(sorted(other)[:1])} has a size by their number; "
        "set light.remove.depth to 0",
    )
