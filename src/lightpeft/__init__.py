"""lightpeft: parameter-efficient fine-tuning on a foundation model that is pruned early in the same run."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightpeft.adapters.full_width import full_width
    from lightpeft.adapters.light_adapter import light_tokenizer, load_light
    from lightpeft.adapters.merging import load_merged, save_merged
    from lightpeft.adapters.sharing import push_to_hub
    from lightpeft.app.exports.exporting import export_model
    from lightpeft.app.folders.switching import LightSwitch
    from lightpeft.app.runs.pipeline import run
    from lightpeft.config import LightConfig, RunConfig, load_config
    from lightpeft.errors import LightPeftError
    from lightpeft.models.on_disk import weights_on_disk
    from lightpeft.models.vocabulary.live import cut_vocabulary
    from lightpeft.peft_kinds.bottleneck import BottleneckConfig
    from lightpeft.peft_kinds.sites.inference import fused_inference
    from lightpeft.plans.estimation_record import EstimationRecord
    from lightpeft.plans.planning import make_plan
    from lightpeft.plans.prune_plan import PrunePlan
    from lightpeft.prune.depth_probes import find_depth
    from lightpeft.prune.discovery import ensure_family
    from lightpeft.prune.light_model import LightModel
    from lightpeft.prune.surgery import apply_plan
    from lightpeft.recipe.pruner import EarlyPruner
    from lightpeft.recipe.trainer import LightTrainer, light_trainer
    from lightpeft.training.acceleration import accelerated

__version__ = "0.1.0"

_HOMES = {
    "EarlyPruner": "recipe.pruner",
    "EstimationRecord": "plans.estimation_record",
    "BottleneckConfig": "peft_kinds.bottleneck",
    "LightConfig": "config",
    "LightModel": "prune.light_model",
    "LightPeftError": "errors",
    "LightSwitch": "app.folders.switching",
    "LightTrainer": "recipe.trainer",
    "PrunePlan": "plans.prune_plan",
    "RunConfig": "config",
    "accelerated": "training.acceleration",
    "apply_plan": "prune.surgery",
    "cut_vocabulary": "models.vocabulary.live",
    "ensure_family": "prune.discovery",
    "export_model": "app.exports.exporting",
    "find_depth": "prune.depth_probes",
    "full_width": "adapters.full_width",
    "fused_inference": "peft_kinds.sites.inference",
    "light_tokenizer": "adapters.light_adapter",
    "light_trainer": "recipe.trainer",
    "load_config": "config",
    "load_light": "adapters.light_adapter",
    "load_merged": "adapters.merging",
    "make_plan": "plans.planning",
    "push_to_hub": "adapters.sharing",
    "run": "app.runs.pipeline",
    "save_merged": "adapters.merging",
    "weights_on_disk": "models.on_disk",
}
"""Public name -> module. Resolved on first use, so that `lightpeft --help` does not wait for torch."""

__all__ = [
    "BottleneckConfig",
    "EarlyPruner",
    "EstimationRecord",
    "LightConfig",
    "LightModel",
    "LightPeftError",
    "LightSwitch",
    "LightTrainer",
    "PrunePlan",
    "RunConfig",
    "accelerated",
    "apply_plan",
    "cut_vocabulary",
    "ensure_family",
    "export_model",
    "find_depth",
    "full_width",
    "fused_inference",
    "light_tokenizer",
    "light_trainer",
    "load_config",
    "load_light",
    "load_merged",
    "make_plan",
    "push_to_hub",
    "run",
    "save_merged",
    "weights_on_disk",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"lightpeft.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lightpeft' has no attribute {name!r}")
