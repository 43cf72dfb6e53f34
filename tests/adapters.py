"""Light models over tiny bases, and light adapters on disk, for the tests of many modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import (
    inputs_for,
    make,
    plan_for,
    with_lora,
)
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from lightpeft.models.unwrap import transformers_model
from lightpeft.prune.light_model import LightModel, as_light
from lightpeft.prune.surgery import apply_plan


def saved_base(name: str, folder: Path, seed: int = 0) -> Path:
    """A folder with a dense base, as a user has it."""
    make(name, seed).save_pretrained(folder)
    return folder


def from_folder(name: str, folder: Path) -> PreTrainedModel:
    return type(make(name)).from_pretrained(folder)


def light_over(
    base: PreTrainedModel,
    metrics: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    **budget: Any,
) -> LightModel:
    """A light model with trained-looking LoRA and head."""
    model = with_lora(base, lora_dropout=0.05, **(lora or {}))
    plan = plan_for(model, **budget)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.add_(torch.randn_like(parameter))
    apply_plan(model, plan)
    return as_light(model.eval(), plan, metrics)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**inputs_for(model)).logits


def save_light(base: PreTrainedModel, folder: Path, **budget: Any) -> LightModel:
    """A light adapter with trained-looking weights over a base that was loaded from disk."""
    model = with_lora(base)
    plan = plan_for(model, **budget)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    apply_plan(model, plan)
    light = as_light(model.eval(), plan)
    light.save_pretrained(folder)
    return light


def saved(home: Path, name: str, budget: dict[str, Any] | None = None, **sharding: Any) -> LightModel:
    """The base `name` in home/base and a light adapter over it in home/light."""
    model = make(name)
    model.save_pretrained(home / "base", **sharding)
    return save_light(type(model).from_pretrained(home / "base"), home / "light", **(budget or {}))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, also those that no checkpoint has (rotary frequencies, kept channels)."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def assert_same(streamed: LightModel, expected: LightModel) -> None:
    ours, theirs = tensors(streamed), tensors(expected)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].requires_grad == tensor.requires_grad, name
        assert ours[name].equal(tensor), name
    modules = [[type(module).__name__ for module in model.modules()] for model in (streamed, expected)]
    assert modules[0] == modules[1] and streamed.training == expected.training
    assert type(transformers_model(streamed)) is type(transformers_model(expected))
    assert logits(streamed).equal(logits(expected))


def edit_weights(base: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Write the weights of a base folder anew."""
    save_file(edit(load_file(base / "model.safetensors")), base / "model.safetensors", metadata={"format": "pt"})


A_THIRD = 1 / 3
"""One block of the three that tiny models have."""


def shallow(base: PreTrainedModel, **budget: Any) -> LightModel:
    """A light model of two blocks with fewer heads and neurons."""
    model = with_lora(base)
    plan = plan_for(model, depth=A_THIRD, **budget)
    apply_plan(model, plan)
    return as_light(model.eval(), plan)


CLOSE = 3e-5
"""Merging adds LoRA's weights to the base's, which rounds."""
