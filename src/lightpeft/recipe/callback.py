"""The recipe and a trainer's callbacks: one callback runs the recipe, and the others get a report on the cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from lightpeft.recipe.checkpoints import LightCheckpoints
from lightpeft.recipe.host import LightHost
from lightpeft.recipe.pruner import EstimationCallback
from lightpeft.training.host import Host
from lightpeft.training.prefix import TrainerPrefix


class LightCallback(EstimationCallback):
    """Run estimation, the cut and checkpoints at the trainer's events."""

    def __init__(self, training: LightHost, checkpoints: LightCheckpoints, prefix: TrainerPrefix) -> None:
        self.training, self.checkpoints, self.prefix = training, checkpoints, prefix

    @property
    def _estimating(self) -> bool:
        return self.training.light_plan is None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training._begin_light(state, control)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._estimating:
            super().on_pre_optimizer_step(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._estimating and self.estimator.finished:
            self.training._cut(state, control)
        elif self._estimating and self.estimator.learns_nothing:
            self.training._let_base_join(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._estimating and control.should_training_stop:
            control.should_training_stop = False  # early stopping may stop the training of the light model alone

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._estimating and self.estimator.steps:
            super().on_log(args, state, control, **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.checkpoints.save(folder, write=state.is_world_process_zero)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.prefix.remove_file()

    @property
    def estimator(self) -> Any:  # type: ignore[override]
        pruner = self.training._light_pruner
        assert pruner is not None
        return pruner.estimator


def report_cut(trainer: Host, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Log the parameter counts before and after the cut, and reset the best metric and early stopping.

    Args:
        before, after: `parameter_report` of the model.
    """
    state = trainer.state
    state.best_metric = state.best_model_checkpoint = state.best_global_step = None
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "early_stopping_patience_counter"):
            callback.early_stopping_patience_counter = 0
    due = trainer.control.should_log
    trainer.log(
        {
            "light/base_parameters_before": before["base"],
            "light/base_parameters_after": after["base"],
            "light/trained_parameters_before": before["trained"],
            "light/trained_parameters_after": after["trained"],
        }
    )
    trainer.control.should_log = due  # the step's loss is still to be logged
