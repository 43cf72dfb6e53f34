"""lightpeft: parameter-efficient fine-tuning on a foundation model that is pruned early in the same run."""

from lightpeft.checkpoint import LightModel, load_light
from lightpeft.config import Budget, LightConfig, RunConfig, load_config, preset_light
from lightpeft.errors import LightPeftError
from lightpeft.planning import make_plan
from lightpeft.pruner import EarlyPruner
from lightpeft.records import EstimationRecord, PrunePlan
from lightpeft.surgery import apply_plan

__all__ = [
    "Budget",
    "EarlyPruner",
    "EstimationRecord",
    "LightConfig",
    "LightModel",
    "LightPeftError",
    "PrunePlan",
    "RunConfig",
    "apply_plan",
    "load_config",
    "load_light",
    "make_plan",
    "preset_light",
]
