"""`light.remove.depth: auto` in a trainer: the number of dropped blocks, found before PEFT modules are placed."""

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
from lightpeft.prune.depth_probes import DECODERS_ONLY, PROBE_ROWS, find_depth, is_classifying_decoder
from lightpeft.prune.light_model import LightModel
from lightpeft.recipe.parallel import broadcast_from_main
from lightpeft.training.arguments import half_precision
from lightpeft.training.rows import batches_of

_log = logging.getLogger(__name__)


def with_depth(light: LightConfig, model: Any, options: Mapping[str, Any]) -> LightConfig:
    """Return the settings with a number for `remove.depth`; `auto` is measured on some of the training rows.

    Args:
        model: dense, or with PEFT modules that have learned nothing; of a light model the settings stay as they are.
        options: keyword arguments of the trainer.

    Raises:
        LightPeftError: the model is not loaded, the dataset has no length, or the rows do not determine a depth.
    """
    if light.remove.depth != "auto" or isinstance(model, LightModel):
        return light
    if not isinstance(model, nn.Module):
        raise LightPeftError("light.remove.depth: auto needs a loaded model; load it first, or set depth to a number")
    if not is_classifying_decoder(model):
        _log.info("light.remove.depth: auto drops no blocks: %s", DECODERS_ONLY)
        return light.with_depth(0.0)
    with torch.random.fork_rng():  # what is made of random numbers afterwards does not depend on this
        found = broadcast_from_main(find_depth(model, *_sample_batches(model, options)))
    depth = found.within(light.remove.blocks)
    _log.info("light.remove.depth: auto drops %.0f%% of the blocks: %s", 100 * depth, found.summary())
    return light.with_depth(depth)


def _sample_batches(model: nn.Module, options: Mapping[str, Any]) -> tuple[Any, torch.dtype | None]:
    """Return batches of some training rows, collated as the trainer does, and its half precision (None: none)."""
    rows, args = cast(Any, options.get("train_dataset")), options.get("args")
    try:
        count = len(rows)
    except TypeError:
        known = "light.remove.depth: auto needs a training dataset with a length; set depth to a number"
        raise LightPeftError(known) from None
    args = TrainingArguments() if args is None else copy.copy(args)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed))[:PROBE_ROWS].tolist()
    given = {name: options.get(name) for name in ("data_collator", "processing_class")}
    return batches_of(rows, Trainer(model, args, **given), drawn, args.eval_batch_size), half_precision(args)
