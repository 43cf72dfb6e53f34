"""`light.remove.depth: auto` in a trainer: how many blocks are left out, found before PEFT modules are placed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from lightpeft.config import LightConfig
from lightpeft.errors import LightPeftError
from lightpeft.prune.light_model import LightModel
from lightpeft.prune.reading import DECODERS_ONLY, PROBE_ROWS, find_depth, is_classifying_decoder
from lightpeft.recipe.parallel import broadcast_from_main
from lightpeft.training.arguments import half_precision
from lightpeft.training.rows import batches_of

_log = logging.getLogger(__name__)


def with_depth(light: LightConfig, model: Any, options: Mapping[str, Any]) -> LightConfig:
    """The settings with a number for their depth; where that is auto, it is read off some of the training rows.

    Args:
        model: dense, or with PEFT modules that have learned nothing; a light one has its depth.
        options: what a trainer is made with beside it.

    Raises:
        LightPeftError: the model is still to be loaded, there are no rows that can be counted, or they do not tell.
    """
    if light.remove.depth != "auto" or isinstance(model, LightModel):
        return light
    if not isinstance(model, nn.Module):
        raise LightPeftError("light.remove.depth: auto asks the model itself; give it loaded, or depth as a number")
    if not is_classifying_decoder(model):
        _log.info("light.remove.depth: auto leaves out none of the blocks: %s", DECODERS_ONLY)
        return light.with_depth(0.0)
    with torch.random.fork_rng():  # what is made of random numbers afterwards does not depend on this
        found = broadcast_from_main(find_depth(model, *_fed(model, options)))
    depth = found.within(light.remove.blocks)
    _log.info("light.remove.depth: auto leaves out %.0f%% of the blocks: %s", 100 * depth, found.summary())
    return light.with_depth(depth)


def _fed(model: nn.Module, options: Mapping[str, Any]) -> tuple[Any, torch.dtype | None]:
    """Batches of some training rows, as any trainer feeds them to a model, and what it computes in."""
    rows, args = cast(Any, options.get("train_dataset")), options.get("args")
    try:
        count = len(rows)
    except TypeError:
        known = "light.remove.depth: auto reads some of a known number of training rows; give depth as a number"
        raise LightPeftError(known) from None
    args = TrainingArguments() if args is None else copy.copy(args)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed))[:PROBE_ROWS].tolist()
    given = {name: options.get(name) for name in ("data_collator", "processing_class")}
    return batches_of(rows, Trainer(model, args, **given), drawn, args.eval_batch_size), half_precision(args)
