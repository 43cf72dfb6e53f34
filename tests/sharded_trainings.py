"""Small light trainings that `test_sharded.py` does in one process, and in two that share weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from lanes import FULL, older
from lights import light_of
from peft import PeftModel
from support import with_bottleneck
from tiny import make, with_lora, without_dropout
from training import dataset, trained_weights
from transformers import TrainingArguments

from lightpeft.recipe.trainer import LightTrainer

FSDP: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}}
ROWS = 8
"""Rows a step."""
MODELS: dict[str, Callable[[], PeftModel]] = {
    "bert-lora": lambda: with_lora(make("bert")),
    "bert-bottleneck": lambda: with_bottleneck(make("bert")),
    "llama-lora": lambda: with_lora(make("llama-gqa")),
    "llama-bottleneck": lambda: with_bottleneck(make("llama-gqa")),
    "gpt-oss-lora": lambda: with_lora(make("gpt_oss")),
}
"""An encoder and a decoder whose heads share keys and values, with both kinds of PEFT, and a mixture of experts whose
heads have parameters of their own."""
if not FULL:
    MODELS = {name: MODELS[name] for name in ("bert-lora", "llama-bottleneck")}
if older("peft", "0.21"):  # which saves no bottleneck adapters
    MODELS = {name: made for name, made in MODELS.items() if "bottleneck" not in name}
LIGHT: dict[str, dict[str, Any]] = {"gpt-oss-lora": {"experts": 0.5}}
"""Settings of some of their own."""
LONG = ("llama-lora",)
"""What trains for 50 steps, the others for 12."""


def training(name: str, folder: Path, processes: int = 1, light: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A `LightTrainer` that sees the rows in order, and cuts after four steps."""
    model = without_dropout(MODELS[name]()).train()
    values: dict[str, Any] = {
        "per_device_train_batch_size": ROWS // processes,
        "max_steps": 50 if name in LONG else 12,
        "learning_rate": 1e-3,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **({"ddp_backend": "gloo"} if processes > 1 else {}),
        **(FSDP if processes > 1 else {}),
        **settings,
    }
    budget = {"length": 4, "heads": 0.5, "neurons": 0.5, "modules": 0.5, "dropout": 0.0}
    rows: Dataset = dataset(causal=not name.startswith("bert"))
    arguments = TrainingArguments(str(folder), **values)
    return LightTrainer(
        model, arguments, light=light_of(**{**budget, **LIGHT.get(name, {}), **(light or {})}), train_dataset=rows
    )


def found(trainer: Any) -> dict[str, Any]:
    """What a training has come to, with the scores that it cut by where it began before the cut."""
    record = trainer.light_record
    return {
        "plan": trainer.light_plan.to_dict(),
        "scores": {} if record is None else record.scores,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": trained_weights(trainer.model),
    }
