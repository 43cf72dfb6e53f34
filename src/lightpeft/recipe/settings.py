"""From the value of `light=` to complete settings, before PEFT modules are placed."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from datasets import ClassLabel, Dataset, Value
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from lightpeft.budget.found import fixed_budget
from lightpeft.config import Light, LightConfig, fill_defaults, light_config
from lightpeft.errors import require
from lightpeft.models.on_disk import has_weights_on_disk
from lightpeft.models.unwrap import transformers_model
from lightpeft.peft_kinds.kinds import kind_of
from lightpeft.peft_kinds.sites.live_sites import own_adapter
from lightpeft.prune.length import remove_nothing_if_short
from lightpeft.prune.light_model import LightModel
from lightpeft.recipe.depth import with_depth
from lightpeft.training.schedule import name_of_length, pace_of_steps, steps_of

_log = logging.getLogger(__name__)


def light_settings(light: Light, peft: PeftConfig, model: nn.Module) -> LightConfig:
    """Return the settings with a default for each unset field, chosen by the PEFT method and the model's output.

    Raises:
        LightPeftError: an unknown form, setting or value, or `train: all` for a model that does not allow it.
    """
    kind, given = kind_of(peft), light_config(light)
    if isinstance(model, LightModel):
        given = _of_light_model(given, model)
    settings = fill_defaults(given, kind.name, can_write(model))
    if settings.train == "all":
        asked = "light.train: all trains the base weights"
        require(kind.merges, f"light.train: all merges PEFT at the cut, and {kind.title} cannot be merged; use LoRA")
        quantized = getattr(transformers_model(model), "is_quantized", False)
        require(not quantized, f"{asked}, which is not possible in 4 or 8 bits; load the base unquantized")
        require(
            not has_weights_on_disk(model), f"{asked}, and this model's are on disk; load it without weights_on_disk"
        )
    return settings


def _of_light_model(given: LightConfig, model: LightModel) -> LightConfig:
    """Return the settings for more training of a model that is cut: `train` as its plan has it.

    Raises:
        LightPeftError: they ask for other weights to train.
    """
    train = model.light_plan.train
    other = f"light.train is {given.train}, and this model was cut with {train}; leave it out"
    require(given.train in (None, train), other)
    return dataclasses.replace(given, train=train)


def settings_of_cut(light: LightConfig) -> dict[str, Any]:
    """Return the sections of the settings that decide what is removed, as JSON holds them."""
    sections = dataclasses.asdict(light)
    return json.loads(json.dumps({name: sections[name] for name in ("remove", "estimate", "modules", "train")}))


def settings_of_trainer(light: Light, peft: PeftConfig, model: nn.Module, options: Mapping[str, Any]) -> LightConfig:
    """Return complete settings for a trainer: a number for the depth, and no cut if `auto` gets too few steps.

    Args:
        model: dense, with PEFT modules that have learned nothing, or light.
        options: keyword arguments of the trainer.

    Raises:
        LightPeftError: an unknown form, setting or value, or `depth: auto` cannot be measured.
    """
    settings = light_settings(light, peft, model)
    if isinstance(model, LightModel):
        return settings
    settings = with_depth(settings, model, options)
    if not settings.is_auto:
        return settings
    args, rows = options.get("args") or TrainingArguments(), options.get("train_dataset")
    planned: Any = SimpleNamespace(args=args, train_dataset=rows)
    steps = steps_of(planned)
    if steps is None:
        return settings
    settings, unable = remove_nothing_if_short(settings, pace_of_steps(planned), steps, longer=name_of_length(args))
    if unable is not None:
        _log.warning("light: auto cuts nothing of the base: %s", unable)
    return settings


def settings_of_loop(light: Light, peft: PeftConfig, model: nn.Module) -> LightConfig:
    """Return complete settings for a custom training loop: a fixed budget in place of `auto`, which needs a trainer."""
    given = light_config(light)
    settings = light_settings(given, peft, model)
    if given.remove.has_amount or not settings.is_auto:
        return settings
    blocks = fixed_budget(gives_classes(model))
    why = "EarlyPruner uses a fixed budget, because a training loop cannot search for one; set it by light=0.4"
    _log.info("light: %.0f%% of the blocks will be cut: %s", 100 * blocks, why)
    return settings.with_blocks(blocks)


def peft_config_of(model: PeftModel) -> PeftConfig:
    """Return the configuration of the adapter that is estimated and cut."""
    return model.peft_config[own_adapter(model)]


def can_write(model: nn.Module) -> bool:
    """Return True if a model has a language-model head that generates text."""
    inner = transformers_model(model)
    return isinstance(inner, PreTrainedModel) and inner.can_generate()


def gives_classes(model: nn.Module, rows: Any = None) -> bool:
    """Return True if a model assigns each row exactly one of several classes.

    Args:
        rows: training rows, which then have integer labels; None: not known.
    """
    inner = transformers_model(model)
    head = type(inner).__name__
    if head.endswith("ForMultipleChoice"):
        return True
    classes = head.endswith("ForSequenceClassification") and inner.config.num_labels > 1
    one = inner.config.problem_type in (None, "single_label_classification") if classes else False
    return one and _may_have_integer_labels(rows)


def _may_have_integer_labels(rows: Any) -> bool:
    """Return True unless the labels of a dataset are known to be no integers."""
    if not isinstance(rows, Dataset):
        return True
    feature = next((rows.features[name] for name in ("labels", "label", "label_ids") if name in rows.features), None)
    return feature is None or isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "int" in feature.dtype)
