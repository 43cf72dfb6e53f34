"""A run's settings as `TrainingArguments`: some settings set a field of it, and `trainer:` sets the other fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from lightpeft.compat.missing import needed_for
from lightpeft.config import TrainingConfig
from lightpeft.config.validation import Within, convert, unknown_key
from lightpeft.errors import LightPeftError, one_line, require
from lightpeft.machine import accelerator, autocast_dtype, deepspeed_launched

_SAME_VALUE = {
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "warmup_steps": "warmup",
    "gradient_checkpointing": "gradient_checkpointing",
    "save_steps": "save_steps",
}
"""Field of `TrainingArguments` -> the setting of `training` with the same value."""
_ALIASES = {
    **{name: f"training.{setting}" for name, setting in _SAME_VALUE.items()},
    "num_train_epochs": "training.epochs",
    "max_steps": "training.epochs",
    "learning_rate": "training.learning_rate",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "seed": "seed",
    "data_seed": "seed",
}
"""Field of `TrainingArguments` -> the setting of a run that determines it."""
TRAINER_DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    # batches of rows of similar length have the least padding
    "train_sampling_strategy": "group_by_length",
    "save_total_limit": 2,
    "log_level": "error",
    "log_level_replica": "error",
    "ddp_find_unused_parameters": False,
    "report_to": [],
}
"""Defaults of a run for fields of `TrainingArguments`, which `trainer:` overrides."""
_RANGES = {"weight_decay": Within(least=0), "max_grad_norm": Within(least=0)}
"""Ranges of fields that transformers does not check."""
_REFUSALS = (TypeError, ValueError, KeyError, ImportError, RuntimeError)
"""Errors of `TrainingArguments` and of trackers about a value."""
_RESERVED = (
    "output_dir",
    "use_cpu",
    "length_column_name",
    "remove_unused_columns",
    "save_strategy",
    "save_only_model",
    "logging_strategy",
    "logging_nan_inf_filter",
    "disable_tqdm",
    "auto_find_batch_size",
    "push_to_hub",
    "resume_from_checkpoint",
)
"""Fields that a run always sets itself."""


def refuse_deepspeed(asked: Any) -> None:
    """Refuse DeepSpeed, the one engine that is not supported.

    Args:
        asked: the trainer's setting `deepspeed`.

    Raises:
        LightPeftError: DeepSpeed is set, or this process was launched for it.
    """
    require(
        not asked and not deepspeed_launched(),
        "deepspeed: its engine does not work with a model that is cut during training; use FSDP2 "
        "(configs/engines/fsdp2.yaml), or train a saved light adapter with another trainer",
    )


def training_arguments(
    config: TrainingConfig, folder: Path, steps: int, seed: int, given: Mapping[str, Any] | None = None
) -> TrainingArguments:
    """Make the `TrainingArguments` of a run.

    Args:
        config: settings with numbers in place of `auto`.
        folder: folder of the checkpoints, of which at most two are kept.
        steps: optimizer steps of the whole run.
        seed: seed of training and of the order of rows.
        given: fields of `TrainingArguments` from `trainer:`.

    Raises:
        LightPeftError: a field does not exist, has a setting of its own, or is set by every run; or transformers
            refuses a value.
    """
    given = given or {}
    check_trainer_fields(given)
    refuse_deepspeed(given.get("deepspeed"))
    autocast = autocast_dtype(config)
    fields: dict[str, Any] = {
        **{name: getattr(config, setting) for name, setting in _SAME_VALUE.items()},
        "max_steps": steps,
        "learning_rate": float(config.learning_rate),
        "bf16": autocast is torch.bfloat16,
        "fp16": autocast is torch.float16,
        "length_column_name": "length",
        "remove_unused_columns": False,
        "save_strategy": "steps",
        "logging_strategy": "steps",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "seed": seed,
        "data_seed": seed,
    }
    try:
        return _make_arguments(folder, {**TRAINER_DEFAULTS, **fields, **given})
    except _REFUSALS as error:
        refused = (f"trainer.{name}" for name, value in given.items() if _is_refused(folder, name, value))
        raise LightPeftError(f"{next(refused, 'trainer')}: {one_line(error, 300)}") from error


def _make_arguments(folder: Path, fields: Mapping[str, Any]) -> TrainingArguments:
    arguments = TrainingArguments(str(folder), use_cpu=accelerator() is None, **fields)
    if arguments.report_to:
        with needed_for("trainer.report_to"):
            from transformers.integrations import get_reporting_integration_callbacks
        for make_callback in get_reporting_integration_callbacks(arguments.report_to):
            make_callback()  # raises if the integration is not installed
    return arguments


def _is_refused(folder: Path, name: str, value: Any) -> bool:
    try:
        _make_arguments(folder, {**TRAINER_DEFAULTS, name: value})
    except _REFUSALS:
        return True
    return False


def half_precision(args: TrainingArguments) -> torch.dtype | None:
    """Return the autocast data type of a trainer; None: it computes in the precision of the weights."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def check_trainer_fields(given: Mapping[str, Any]) -> None:
    """Check the fields of `trainer:`.

    Raises:
        LightPeftError: a field that `trainer:` cannot set, or a value out of range.
    """
    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    for name in given:
        require(name not in _ALIASES, f"trainer.{name} is determined by {_ALIASES.get(name)}; set that instead")
        require(name not in _RESERVED, f"trainer.{name} is set by the run itself; leave it out")
        if name not in known:
            raise LightPeftError(unknown_key(f"trainer.{name}", [f"trainer.{each}" for each in known]))
        if name in _RANGES:
            _RANGES[name].check(convert(given[name], float, f"trainer.{name}"), f"trainer.{name}")
