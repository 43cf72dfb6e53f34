"""Interface of a trainer that prunes, for the parts of the recipe."""

from __future__ import annotations

from typing import Any, Protocol

from transformers import TrainerControl, TrainerState

from lightpeft.budget.trainer import SearchHost
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.recipe.pruner import EarlyPruner


class LightHost(SearchHost, Protocol):
    """The attributes and methods of `LightTraining` that its callback, checkpoints, schedule and refusals use."""

    light_plan: PrunePlan | None
    light_report: dict[str, Any]
    light_longer: str
    _light_pruner: EarlyPruner | None
    _estimation_steps: int
    _base_joined: int
    """Step of estimation from which all weights train; 0: PEFT trains alone."""

    def _warn(self, line: str) -> None: ...
    def _begin_light(self, state: TrainerState, control: TrainerControl) -> None: ...
    def _let_base_join(self, state: TrainerState) -> None: ...
    def _cut(self, state: TrainerState, control: TrainerControl) -> None: ...
