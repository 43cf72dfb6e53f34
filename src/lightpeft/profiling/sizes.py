"""Sizes of a model: its parameters in memory, its files on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from lightpeft.compat.peft import BaseTunerLayer, ModulesToSaveWrapper
from lightpeft.errors import require
from lightpeft.models.all_weights import trained_weights
from lightpeft.models.linears.bitsandbytes import logical_numel
from lightpeft.models.unwrap import peft_weights, transformers_model
from lightpeft.models.vocabulary.cutting import cut_parameters


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of scalar parameters; tied weights count once."""

    base: int
    """Parameters of the foundation model, without PEFT weights and without the copies of modules that PEFT trains."""
    peft: int
    """PEFT weights of all adapters, whether they require a gradient or not."""
    head: int
    """Parameters of full modules saved with the adapter (`modules_to_save`, such as a classifier). Each is a copy of a
    module that `base` already counts."""
    trainable: int
    """Parameters of any kind that require a gradient."""

    @property
    def total(self) -> int:
        """Parameters of the model with its adapters: base + peft (a saved module stands in for its original)."""
        return self.base + self.peft


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of a bare transformers model or a PeftModel, pruned or not."""
    head = {id(p) for wrapper in _of_type(model, ModulesToSaveWrapper) for p in wrapper.modules_to_save.parameters()}
    peft = {id(p) for layer in _of_type(model, BaseTunerLayer) for p in peft_weights(layer)} - head
    sizes = {id(p): logical_numel(p) for p in model.parameters()}
    return ParameterCount(
        base=sum(size for key, size in sizes.items() if key not in head | peft),
        peft=sum(sizes[key] for key in peft),
        head=sum(sizes[key] for key in head),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def _of_type(model: nn.Module, cls: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, cls)]


def folder_bytes(path: str | Path) -> int:
    """Sum up the sizes of all files below a folder, in bytes.

    Raises:
        LightPeftError: `path` is not a folder.
    """
    path = Path(path)
    require(path.is_dir(), f"{path} is not a folder; give the folder to measure")
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def parameter_report(model: nn.Module) -> dict[str, Any]:
    """Count the parameters of a live model, those that were trained, and the removed fraction of the base."""
    count = count_parameters(model)
    plan = getattr(model, "light_plan", None)
    dense = (count.base if plan is None else plan.base_parameters) + cut_parameters(transformers_model(model))
    sizes = {
        "base_dense": dense,
        "base": count.base,
        "base_removed_ratio": 1 - count.base / dense,
        "peft": count.peft,
        "head": count.head,
    }
    if isinstance(model, PeftModel):
        # a light model may be loaded frozen
        all_train = plan is not None and plan.train == "all"
        own = sum(p.numel() for p in trained_weights(model).values() if p.requires_grad or all_train)
        return {**sizes, "trained": count.peft + count.head + own}
    return sizes if plan is not None else {**sizes, "trained": count.base}  # merging leaves no trace of what trained
