"""Depth pruning: dropping the top blocks of a model."""

from __future__ import annotations

import copy

from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lightpeft.errors import require
from lightpeft.models.families.family_table import block_lists
from lightpeft.models.tables import shapes_of
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.sites.live_sites import refresh_config


def leave_out(model: nn.Module, stay: int) -> None:
    """Drop all blocks above the lowest `stay` from a transformers model, or the one inside a PeftModel, in place.

    The last norm and the head then read the output of the last remaining block. The config gets the new depth, so that
    generation, caches and `save_pretrained` work; PEFT modules in dropped blocks are removed. A model with at most
    `stay` blocks does not change.

    Raises:
        LightPeftError: the model has several stacks of blocks, or a parameter beside the blocks whose size depends on
            their number; nothing was dropped.
    """
    inner = transformers_model(model)
    stacks, kind = block_lists(inner), inner.config.model_type
    several = f"depth pruning needs a model with one stack of blocks, and {kind} has {len(stacks)}"
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
    """Check that the shapes of a model's parameters do not depend on the number of blocks."""
    config = copy.deepcopy(inner.config)
    _set_depth(config, stay)
    shapes = shapes_of(type(inner), config)
    # quantized weights have other shapes, and are integers
    own = {name: p.shape for name, p in inner.named_parameters() if p.is_floating_point()}
    other = [name for name in own.keys() & shapes.keys() if own[name] != shapes[name]]
    require(
        not other,
        f"{inner.config.model_type} cannot lose blocks: the size of {', '.join(sorted(other)[:1])} depends on their "
        "number; set light.remove.depth to 0",
    )
