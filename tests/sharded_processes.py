"""What `test_sharded.py` runs in two processes that share weights (over gloo) by FSDP2."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from lanes import older
from sharded_trainings import MODELS, found, training
from tiny import make
from torch.distributed.tensor import DTensor
from training import StopAt

from lightpeft.errors import LightPeftError
from lightpeft.models.unwrap import transformers_model


def trainings(folder: Path) -> None:
    """All models, and one from a checkpoint on each side of the cut."""
    place = folder / f"rank{os.environ['RANK']}"
    place.mkdir(parents=True)
    make("bert").save_pretrained(place / "base")
    for name in MODELS:
        trainer = training(name, folder / name, processes=2)
        trainer.train()
        torch.save({**found(trainer), **sharded(trainer.model)}, place / f"{name}.pt")
        trainer.save_model(str(folder / name / "adapter"))
    for side, step in (("before", 3), ("behind", 8)):
        torch.save(found(resumed(folder / side, step)), place / f"{side}.pt")
    undisturbed = training("bert-lora", folder / "half", processes=2, bf16=True)
    undisturbed.train()
    torch.save(found(undisturbed), place / "half.pt")
    torch.save(found(resumed(folder / "half", 8, bf16=True)), place / "half-resumed.pt")
    refused = {}
    for setting, changes in REFUSED.items():
        try:
            training("bert-lora", folder / "refused", processes=2, **changes)
        except LightPeftError as error:
            refused[setting] = str(error)
    (place / "refused.json").write_text(json.dumps(refused))


def resumed(folder: Path, step: int, **settings: Any) -> Any:
    """A training that was stopped, and has gone on from its checkpoint."""
    first = training("bert-lora", folder, processes=2, save_strategy="steps", save_steps=step, **settings)
    first.add_callback(StopAt(step))
    first.train()
    again = training("bert-lora", folder, processes=2, **settings)
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    return again


OFFLOADED: dict[str, Any] = {"fsdp_config": {"version": 2, "cpu_offload": True}}
if older("transformers", "5.16"):  # which wants it in other words
    OFFLOADED = {"fsdp": "full_shard offload", "fsdp_config": {"version": 2}}
REFUSED: dict[str, dict[str, Any]] = {
    "cpu_offload": OFFLOADED,
    "cpu_ram_efficient_loading": {"fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True}},
    "activation_checkpointing": {"fsdp_config": {"version": 2, "activation_checkpointing": True}},
    "keep": {"light": {"keep": "full"}},
}


def sharded(model: torch.nn.Module) -> dict[str, Any]:
    """How many numbers the base has, and how many of them this process holds."""
    base = [p for p in transformers_model(model).parameters() if not p.requires_grad]
    return {"numbers": sum(p.numel() for p in base), "held": sum(_held(p) for p in base)}


def _held(parameter: Any) -> int:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
