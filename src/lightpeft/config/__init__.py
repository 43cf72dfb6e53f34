"""What a user can set: typed, documented dataclasses, checked when they are made.

`LightConfig` is all that `EarlyPruner` and `LightTrainer` need. `RunConfig` adds the model, the data and the training
of a whole `lightpeft run`; it is read from YAML and from the command line, and an unknown key names its nearest
neighbour.
"""

from lightpeft.config.light import (
    READ_BY_PLANS,
    Budget,
    HeadUnit,
    LightConfig,
    ModuleCriterion,
    RankCriterion,
    Scope,
    Tolerance,
    UnitCriterion,
)
from lightpeft.config.methods import METHODS, Method, MethodName
from lightpeft.config.peft import Peft, peft_type
from lightpeft.config.presets import (
    NOTHING_REMOVED,
    PRESETS,
    WRITTEN,
    Preset,
    cut_of_writer,
    overlaid,
    preset_light,
    preset_settings,
    usual_preset,
)
from lightpeft.config.run import (
    SWITCHES,
    AnswerBy,
    Auto,
    DataConfig,
    LikelihoodRule,
    ModelConfig,
    PrefixPlace,
    RunConfig,
    TaskEntry,
    TrainingConfig,
    load_config,
    run_config_from_dict,
)

__all__ = [
    "METHODS",
    "NOTHING_REMOVED",
    "PRESETS",
    "READ_BY_PLANS",
    "SWITCHES",
    "WRITTEN",
    "AnswerBy",
    "Auto",
    "Budget",
    "DataConfig",
    "HeadUnit",
    "LightConfig",
    "LikelihoodRule",
    "Method",
    "MethodName",
    "ModelConfig",
    "ModuleCriterion",
    "Peft",
    "PrefixPlace",
    "Preset",
    "RankCriterion",
    "RunConfig",
    "Scope",
    "TaskEntry",
    "Tolerance",
    "TrainingConfig",
    "UnitCriterion",
    "cut_of_writer",
    "load_config",
    "overlaid",
    "peft_type",
    "preset_light",
    "preset_settings",
    "run_config_from_dict",
    "usual_preset",
]
