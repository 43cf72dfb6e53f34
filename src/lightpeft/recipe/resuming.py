"""A trainer's checkpoints from behind the cut, and of models that have the PeftModel inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from lightpeft.errors import require
from lightpeft.files import read_json, read_tensors, understandable, write_json, write_tensors
from lightpeft.plans.records import PrunePlan
from lightpeft.prune.light_model import as_light
from lightpeft.prune.surgery import apply_plan
from lightpeft.saving.adapter_files import DESCRIPTION, read_description

_CUT = "lightpeft_cut.json"
"""What says that a checkpoint lies behind the cut."""
_OUTSIDE = "lightpeft_outside.safetensors"
"""What trains beside the PeftModel, in models that have it inside."""


def write_cut(folder: Path, report: dict[str, Any]) -> None:
    """Note in a checkpoint that its model is cut.

    Raises:
        LightPeftError: it cannot be written.
    """
    write_json(folder / _CUT, report)


def read_cut(folder: Path) -> dict[str, Any] | None:
    """What `write_cut` wrote; None in a checkpoint from before the cut."""
    if not (folder / _CUT).is_file():
        return None
    report = read_json(folder / _CUT)
    with understandable(folder / _CUT):
        int(report["estimation_steps"])
    return report


def cut_as_saved(model: PeftModel, fingerprint: str, folder: Path) -> PrunePlan:
    """Cut a dense model, in place, to the plan of a checkpoint; its weights are still to be loaded.

    Args:
        fingerprint: of the dense model.

    Raises:
        LightPeftError: the checkpoint is damaged, or of another base.
    """
    place = _adapter_folder(folder)
    with understandable(place / DESCRIPTION):
        plan = PrunePlan.from_dict(read_description(place)["plan"])
    require(plan.fingerprint == fingerprint, f"{folder} was made from another base; give the one that it was made from")
    apply_plan(model, plan)
    as_light(model, plan)
    return plan


def save_outside(model: nn.Module, inside: PeftModel, folder: Path) -> None:
    """Write what trains of a model beside the PeftModel inside it; nothing where nothing does."""
    trained = {name: p.detach() for name, p in _outside(model, inside).items()}
    if trained:
        write_tensors(folder / _OUTSIDE, trained)


def load_inside(model: nn.Module, inside: PeftModel, folder: Path) -> None:
    """Load the adapter of a checkpoint into the PeftModel inside a model, and what trains beside it."""
    inside.load_adapter(str(_adapter_folder(folder)), str(inside.active_adapter), is_trainable=True)
    saved = read_tensors(folder / _OUTSIDE) if (folder / _OUTSIDE).is_file() else {}
    with torch.no_grad():
        for name, parameter in _outside(model, inside).items():
            require(name in saved, f"{folder} has no weights for {name}")
            parameter.copy_(saved[name])


def _outside(model: nn.Module, inside: PeftModel) -> dict[str, nn.Parameter]:
    own = {id(p) for p in inside.parameters()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in own}


def _adapter_folder(folder: Path) -> Path:
    """Where in a checkpoint the adapter is: models that have it inside save it in a folder of their own."""
    return next((file.parent for file in sorted(folder.rglob("adapter_config.json"))), folder)
