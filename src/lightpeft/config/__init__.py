"""Settings: typed, documented dataclasses that check their values when they are made.

`LightConfig` is all that `EarlyPruner` and `LightTrainer` need. `RunConfig` adds the model, the data and the training
of a whole `lightpeft run`; it is read from YAML and from the command line, and an unknown key names its nearest
neighbor.
"""

from lightpeft.config.derived import fill_defaults, override_light, tolerance_of
from lightpeft.config.light import (
    READ_AFTERWARDS,
    READ_BY_PLANS,
    After,
    Estimate,
    LightConfig,
    Modules,
    Rates,
    Remove,
    Scope,
    Tolerance,
    UnitCriterion,
)
from lightpeft.config.methods import METHODS, Method
from lightpeft.config.peft import peft_type
from lightpeft.config.presets import (
    PRESETS,
    WRITTEN,
    Light,
    cut_of_writer,
    light_config,
    light_mapping,
    merge_settings,
)
from lightpeft.config.run import (
    SWITCHES,
    AnswerBy,
    DataConfig,
    LikelihoodRule,
    ModelConfig,
    RunConfig,
    TaskEntry,
    TrainingConfig,
    load_config,
    run_config_from_dict,
)

__all__ = [
    "METHODS",
    "PRESETS",
    "READ_AFTERWARDS",
    "READ_BY_PLANS",
    "SWITCHES",
    "WRITTEN",
    "After",
    "AnswerBy",
    "DataConfig",
    "Estimate",
    "Light",
    "LightConfig",
    "LikelihoodRule",
    "Method",
    "ModelConfig",
    "Modules",
    "Rates",
    "Remove",
    "RunConfig",
    "Scope",
    "TaskEntry",
    "Tolerance",
    "TrainingConfig",
    "UnitCriterion",
    "cut_of_writer",
    "fill_defaults",
    "light_config",
    "light_mapping",
    "load_config",
    "merge_settings",
    "override_light",
    "peft_type",
    "run_config_from_dict",
    "tolerance_of",
]
