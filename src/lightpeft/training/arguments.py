"""A run's settings as `TrainingArguments`: ours are aliases of some fields, `trainer:` reaches the others."""

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

_AS_THEY_ARE = {
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "warmup_steps": "warmup",
    "gradient_checkpointing": "gradient_checkpointing",
    "save_steps": "save_steps",
}
"""Field of `TrainingArguments` -> the setting of `training` that is its value."""
_ALIASES = {
    **{name: f"training.{setting}" for name, setting in _AS_THEY_ARE.items()},
    "num_train_epochs": "training.epochs",
    "max_steps": "training.epochs",
    "learning_rate": "training.learning_rate",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "seed": "seed",
    "data_seed": "seed",
}
"""Field of `TrainingArguments` -> the setting that says it here."""
USUAL: dict[str, Any] = {
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
"""Fields of `TrainingArguments` that a run sets unless `trainer:` does."""
_NUMBERS = {"weight_decay": Within(least=0), "max_grad_norm": Within(least=0)}
"""Fields whose numbers transformers does not look at."""
_OWN = (
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
"""Fields that are the run folder's business."""


def refuse_deepspeed(asked: Any) -> None:
    """Refuse the one engine that nothing is done for.

    Args:
        asked: a trainer's setting `deepspeed`.

    Raises:
        LightPeftError: it is asked for, or this process was started for it.
    """
    require(
        not asked and not deepspeed_launched(),
        "DeepSpeed's engine cannot follow a model that is cut on the way; share weights by FSDP2 "
        "(configs/engines/fsdp2.yaml), or fine-tune a light adapter by a trainer of another kind",
    )


def training_arguments(
    config: TrainingConfig, folder: Path, steps: int, seed: int, given: Mapping[str, Any] | None = None
) -> TrainingArguments:
    """How a run trains.

    Args:
        config: with numbers for `auto`.
        folder: for checkpoints, two at most.
        steps: optimizer steps of the whole run.
        given: other fields of `TrainingArguments`.

    Raises:
        LightPeftError: a field that there is not, that has a setting of its own or that a run decides, or a value that
            transformers does not take.
    """
    check_given(given or {})
    refuse_deepspeed((given or {}).get("deepspeed"))
    autocast = autocast_dtype(config)
    fields: dict[str, Any] = {
        **USUAL,
        **{name: getattr(config, setting) for name, setting in _AS_THEY_ARE.items()},
        "output_dir": str(folder),
        "max_steps": steps,
        "learning_rate": float(config.learning_rate),
        "bf16": autocast is torch.bfloat16,
        "fp16": autocast is torch.float16,
        "use_cpu": accelerator() is None,
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
        arguments = TrainingArguments(**{**fields, **(given or {})})
        if arguments.report_to:
            with needed_for("trainer.report_to"):
                from transformers.integrations import get_reporting_integration_callbacks, is_tensorboard_available
            get_reporting_integration_callbacks(arguments.report_to)  # which knows and imports them
            there = "tensorboard" not in arguments.report_to or is_tensorboard_available()
            require(there, "trainer.report_to: tensorboard is not installed; pip install tensorboard")
        return arguments
    except (TypeError, ValueError, KeyError, ImportError) as error:
        raise LightPeftError(f"trainer: {one_line(error, 300)}") from error


def half_precision(args: TrainingArguments) -> torch.dtype | None:
    """What a trainer computes in under autocast; None: in the precision of the weights."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def check_given(given: Mapping[str, Any]) -> None:
    """Raise `LightPeftError` for fields that `trainer:` cannot set."""
    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    for name in given:
        require(name not in _ALIASES, f"trainer.{name} is {_ALIASES.get(name)} here; set that")
        require(name not in _OWN, f"trainer.{name} is the run's own to set; leave it out")
        if name not in known:
            raise LightPeftError(unknown_key(f"trainer.{name}", [f"trainer.{each}" for each in known]))
        if name in _NUMBERS:
            _NUMBERS[name].check(convert(given[name], float, f"trainer.{name}"), f"trainer.{name}")
