"""From what `light=` was given to settings that a training can run by, before PEFT modules are placed."""

from __future__ import annotations

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
from lightpeft.peft_kinds.sites.registry import own_adapter
from lightpeft.prune.length import remove_nothing_if_short
from lightpeft.prune.light_model import LightModel
from lightpeft.recipe.depth import with_depth
from lightpeft.training.schedule import pace_of, steps_of

_log = logging.getLogger(__name__)


def light_settings(light: Light, peft: PeftConfig, model: nn.Module) -> LightConfig:
    """The settings with a value for all that is unset, by the kind of PEFT and by what the model gives.

    Raises:
        LightPeftError: an unknown form, setting or value, or all weights are to train of a model that cannot.
    """
    kind = kind_of(peft)
    settings = fill_defaults(light_config(light), kind.name, can_write(model))
    if settings.train == "all":
        asked = "light.train: all trains the weights that are left"
        require(kind.merges, f"light.train: all merges PEFT at the cut, and {kind.title} cannot be merged; use LoRA")
        quantised = getattr(transformers_model(model), "is_quantized", False)
        require(not quantised, f"{asked}, which cannot be done in 4 or 8 bits; give the base unquantised")
        require(not has_weights_on_disk(model), f"{asked}, and those of this model are on disk; load it into memory")
    return settings


def settings_of_trainer(light: Light, peft: PeftConfig, model: nn.Module, options: Mapping[str, Any]) -> LightConfig:
    """The same for a trainer: with a number for the depth, and without a cut where training is too short to find one.

    Args:
        model: dense, with PEFT modules that have learned nothing, or a light one, which stays as it is.
        options: what the trainer is made with beside it.

    Raises:
        LightPeftError: also where `with_depth` does.
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
    settings, unable = remove_nothing_if_short(settings, pace_of(planned), steps, longer="num_train_epochs")
    if unable is not None:
        _log.warning("nothing of the base goes: %s", unable)
    return settings


def settings_of_loop(light: Light, peft: PeftConfig, model: nn.Module) -> LightConfig:
    """The same for a loop that somebody writes, in which no budget can be searched for."""
    given = light_config(light)
    settings = light_settings(given, peft, model)
    if given.remove.says_how_much or not settings.is_auto:
        return settings
    blocks = fixed_budget(gives_classes(model))
    why = "a fixed budget, since a loop of your own cannot search for one; light=0.4 cuts 40%"
    _log.info("%.0f%% of the blocks go: %s", 100 * blocks, why)
    return settings.removing(blocks)


def peft_config_of(model: PeftModel) -> PeftConfig:
    """The configuration of the adapter that is estimated and cut."""
    return model.peft_config[own_adapter(model)]


def can_write(model: nn.Module) -> bool:
    """Whether a model has the head of a language model that writes."""
    inner = transformers_model(model)
    return isinstance(inner, PreTrainedModel) and inner.can_generate()


def gives_classes(model: nn.Module, rows: Any = None) -> bool:
    """Whether a model gives each row one of several classes.

    Args:
        rows: that it trains on, whose labels are whole numbers then; None: not known.
    """
    inner = transformers_model(model)
    head = type(inner).__name__
    if head.endswith("ForMultipleChoice"):
        return True
    classes = head.endswith("ForSequenceClassification") and inner.config.num_labels > 1
    one = inner.config.problem_type in (None, "single_label_classification") if classes else False
    return one and _whole_numbers(rows)


def _whole_numbers(rows: Any) -> bool:
    """Whether the labels of rows are whole numbers, as far as can be told."""
    if not isinstance(rows, Dataset):
        return True
    feature = next((rows.features[name] for name in ("labels", "label", "label_ids") if name in rows.features), None)
    return feature is None or isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "int" in feature.dtype)
