"""lightpeft: parameter-efficient fine-tuning on a foundation model that is pruned early in the same run."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightpeft.acceleration import accelerated
    from lightpeft.checkpoint import LightModel, load_light
    from lightpeft.config import Budget, LightConfig, RunConfig, load_config, preset_light
    from lightpeft.discovery import ensure_family
    from lightpeft.errors import LightPeftError
    from lightpeft.exporting import load_merged, save_merged
    from lightpeft.pipeline import run
    from lightpeft.planning import make_plan
    from lightpeft.pruner import EarlyPruner
    from lightpeft.records import EstimationRecord, PrunePlan
    from lightpeft.surgery import apply_plan

__version__ = "0.1.0"

_HOMES = {
    "Budget": "config",
    "EarlyPruner": "pruner",
    "EstimationRecord": "records",
    "LightConfig": "config",
    "LightModel": "checkpoint",
    "LightPeftError": "errors",
    "PrunePlan": "records",
    "RunConfig": "config",
    "accelerated": "acceleration",
    "apply_plan": "surgery",
    "ensure_family": "discovery",
    "load_config": "config",
    "load_light": "checkpoint",
    "load_merged": "exporting",
    "make_plan": "planning",
    "preset_light": "config",
    "run": "pipeline",
    "save_merged": "exporting",
}
"""Public name -> module. Resolved on first use, so that `lightpeft --help` does not wait for torch."""

__all__ = [
    "Budget",
    "EarlyPruner",
    "EstimationRecord",
    "LightConfig",
    "LightModel",
    "LightPeftError",
    "PrunePlan",
    "RunConfig",
    "accelerated",
    "apply_plan",
    "ensure_family",
    "load_config",
    "load_light",
    "load_merged",
    "make_plan",
    "preset_light",
    "run",
    "save_merged",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"lightpeft.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lightpeft' has no attribute {name!r}")
