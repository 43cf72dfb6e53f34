"""Light-PEFT inside any `Trainer`: estimate, cut and fine-tune in one `train()`.

Read `LightTraining` from top to bottom: what happens where training begins, at the cut, and at the end.
"""

from __future__ import annotations

import copy
import functools
import logging
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from peft import PeftConfig, PeftModel
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, set_seed
from transformers.trainer_utils import get_last_checkpoint

from lightpeft.compat.accelerate import as_it_is
from lightpeft.config import LightConfig, cut_of_writer
from lightpeft.peft_kinds.sites import own_adapter
from lightpeft.plans.planning import make_plan
from lightpeft.plans.records import EstimationRecord, PrunePlan
from lightpeft.profiling.sizes import parameter_report
from lightpeft.prune.budgeting import FoundBudget
from lightpeft.prune.estimation import Estimator
from lightpeft.prune.learning import untaught
from lightpeft.prune.length import fitted
from lightpeft.prune.light_model import LightModel
from lightpeft.recipe.arguments import taken, with_dense_reference
from lightpeft.recipe.budget import BudgetMixin
from lightpeft.recipe.checkpoints import CheckpointsMixin
from lightpeft.recipe.course import Course, tell_cut
from lightpeft.recipe.depth import with_depth
from lightpeft.recipe.naming import NamedModel
from lightpeft.recipe.optimizing import OptimizingMixin
from lightpeft.recipe.parallel import agreed
from lightpeft.recipe.pruner import EarlyPruner, can_write, cut, light_settings
from lightpeft.recipe.refusals import check_length, check_light, refuse_parts
from lightpeft.recipe.wrapping import inner_peft_model, with_peft
from lightpeft.training.acceleration import light_steps
from lightpeft.training.prefix import PrefixCache, PrefixMixin
from lightpeft.training.schedule import pace_of
from lightpeft.training.sharding import ShardingMixin
from lightpeft.training.step_rows import check_step, rows_a_step
from lightpeft.training.trainer import Repeatable, meeting_others, train_in_float32

_log = logging.getLogger(__name__)
AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


class LightTraining(CheckpointsMixin, OptimizingMixin, BudgetMixin, PrefixMixin, ShardingMixin, Repeatable):
    """What `light_trainer` adds to a trainer: its first steps find out what the task needs, then the model is cut.

    It takes all arguments of the trainer. What it finds is there after training.

    Args:
        light: a preset's name, or a `LightConfig`; None: `writer` for a model that can write texts, `default` for all
            others.
        peft_config: PEFT modules for a dense model; without `target_modules` they sit on all projections of the blocks
            in which `light` lets modules stay. A model that is a PeftModel needs none.
        fast_steps: fused LoRA layers, a language model's head for labelled tokens alone, fewer steps back through
            attention and norms on a CPU, and activations that the backward pass makes again.
        prefix_cache: how the outputs of the frozen lower blocks are kept from epoch to epoch; None: not at all.

    Attributes:
        light_plan: which units of the dense base are left; None where training ended before the cut.
        light_record: the scores behind it; None where training went on from behind the cut.
        light_budget: what `light.blocks: auto` found, and what that is expected to cost; None otherwise.
        light_report: steps and seconds of estimation, and parameters before and after the cut.

    Raises:
        LightPeftError: what cannot work with a model that changes on the way, in one line, before training.
    """

    light_plan: PrunePlan | None = None
    light_record: EstimationRecord | None = None
    light_budget: FoundBudget | None = None
    light_report: dict[str, Any]
    light_longer = "num_train_epochs"
    """The setting that makes training longer, as the caller knows it."""

    def __init__(
        self,
        model: Any = None,
        *args: Any,
        light: str | LightConfig | None = None,
        peft_config: PeftConfig | None = None,
        fast_steps: bool = True,
        prefix_cache: PrefixCache | None = PrefixCache(),  # noqa: B008 (frozen)
        **options: Any,
    ) -> None:
        args, options = taken(super().__init__, args, options)
        self.fast_steps, self.prefix_cache, self.light_report = fast_steps, prefix_cache, {}
        if peft_config is not None and not isinstance(model, nn.Module):  # a name, from which TRL's trainers load
            named = NamedModel(model, peft_config, light, options)
            options["peft_config"] = named.peft_config
            with named.loaded_by(type(self)):
                super().__init__(model, *args, **with_dense_reference(options))  # type: ignore[call-arg]
            light = named.light
        else:
            refuse_parts(model)
            if isinstance(light, LightConfig):
                light = with_depth(light, model, options)
            if peft_config is not None:
                model = with_peft(model, peft_config, light_settings(light, peft_config, model))
            super().__init__(model, *args, **with_dense_reference(options))  # type: ignore[call-arg]
        self._peft_model = inner_peft_model(self._trainer.model)
        self.light_config = light_settings(
            light, self._peft_model.peft_config[own_adapter(self._peft_model)], self._peft_model
        )
        check_light(self)
        self._trainer.args = copy.copy(self._trainer.args)  # the user's own stay as they are
        if self._trainer.args.fp16:
            train_in_float32(self._trainer.model)
        if self.light_config.keep != "light":
            self._note_full_width()
        self.light_plain_rate = self._trainer.args.learning_rate
        self._light_contexts = ExitStack()
        self._estimation_steps, self._light_seconds = 0, {"estimation": 0.0, "cut": 0.0}
        self._light_checkpoint: str | None = None
        if isinstance(self._peft_model, LightModel):
            self._light_pruner: EarlyPruner | None = None
            self.light_plan = self._peft_model.light_plan
        else:
            self._light_pruner = EarlyPruner(self._peft_model, self.light_config, self.make_light_estimator)
        check_length(self)
        self._set_rate()
        self._trainer.add_callback(Course(self))

    # -- the recipe ----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """Estimate, cut and fine-tune; `resume_from_checkpoint` may lie on either side of the cut."""
        newest = get_last_checkpoint(self._trainer.args.output_dir) if resume_from_checkpoint is True else None
        self._light_checkpoint = newest if resume_from_checkpoint is True else resume_from_checkpoint or None
        if self._light_checkpoint is None:
            self._estimation_steps = 0  # a light model that trains once more does so for the whole of it
        else:
            check_step(Path(self._light_checkpoint), self._trainer.args)
        try:
            with meeting_others():
                self._foresee_prefix(self._peft_model)
                self._before_sharding(self._light_checkpoint)
                result = super().train(self._light_checkpoint, *args, **options)
                self._behind_sharding()
            if self._light_pruner is not None and self.light_record is None and self.light_plan is None:
                ended = f"training ended at step {self._trainer.state.global_step}, inside estimation"
                self._warn(f"{ended}: the model is the dense one still")
            return result
        finally:
            self._leave_light()
            if self._light_pruner is not None:
                self._light_pruner.estimator.stop()

    def _begin_light(self, state: TrainerState, control: TrainerControl) -> None:
        """Training begins, or goes on from a checkpoint: with estimation, or behind the cut.

        Where nothing is to go there is nothing to estimate: the model is a light one at once.
        """
        if self.light_plan is not None:
            self._begin_light_fine_tuning(state.max_steps)
            return
        assert self._light_pruner is not None
        if can_write(self._peft_model) and (line := cut_of_writer(self.light_config)) is not None:
            self._warn(line)
        settings = fitted(self.light_config, pace_of(self._trainer), state.max_steps, longer=self.light_longer)
        self._light_pruner.config = self._light_pruner.estimator.config = settings
        self._light_pruner.estimator.start(state.max_steps)
        if self._light_checkpoint is not None:
            self._light_pruner.estimator.load_state(self._light_checkpoint)
        self._light_started = time.perf_counter()
        if self._light_pruner.finished:
            self._cut(state, control)
        else:
            self._enter_light(self._light_acceleration())

    # -- 1. estimation: masks and PEFT modules train together ----------------------------------------------------

    def make_light_estimator(self, model: PeftModel, light: LightConfig) -> Estimator:
        """What estimates. To be overridden."""
        return Estimator(model, light)

    # -- 2. the cut, once ----------------------------------------------------------------------------------------

    def _cut(self, state: TrainerState, control: TrainerControl) -> None:
        """Estimation is over: plan, cut the model in place, and go on with a new optimizer and schedule."""
        assert self._light_pruner is not None
        self._light_seconds["estimation"] = time.perf_counter() - self._light_started
        self._estimation_steps = state.global_step
        self._light_pruner.estimator.stop()
        self._leave_light()
        self._behind_sharding()
        self.light_record = self._light_pruner.record()
        self.light_record.meta["rows_a_step"] = rows_a_step(self._trainer.args)
        plan = self.make_light_plan(self.light_record)
        if plan is None:
            control.should_training_stop = True
            return
        line = untaught(self.light_record) if plan.removed_of_blocks else None
        if line is not None:
            self._warn(line)
        started = time.perf_counter()
        before = parameter_report(self._peft_model)
        with as_it_is(self._peft_model), self._answering():
            light = self.prune_light_model(plan)
        self.light_plan = plan
        self._light_seconds["cut"] = time.perf_counter() - started
        self._renew_optimizer(state.max_steps)
        set_seed(self._trainer.args.seed + 1)  # so that what follows does not depend on how it came here
        self._note_cut(before, parameter_report(light))
        self._begin_light_fine_tuning(state.max_steps)

    def make_light_plan(self, record: EstimationRecord) -> PrunePlan | None:
        """What stays, decided once, when estimation is over; None ends training without a cut. To be overridden."""
        light = self.light_config
        if light.blocks == "auto":
            self.light_budget = self.find_light_budget(record, self._trainer.state.max_steps)
            self._light_seconds["budget"] = self.light_budget.seconds
            _log.log(logging.INFO if self.light_budget.blocks else logging.WARNING, "%s", self.light_budget.summary())
            light = replace(light, blocks=agreed(self.light_budget.blocks))
        return make_plan(record, light)

    def prune_light_model(self, plan: PrunePlan) -> LightModel:
        """Cut the model down to the plan, in place. To be overridden."""
        return cut(self._peft_model, plan)

    # -- 3. fine-tuning of what is left --------------------------------------------------------------------------

    def _begin_light_fine_tuning(self, max_steps: int) -> None:
        """Training of the cut model begins, or goes on from a checkpoint."""
        self._open_prefix(self._peft_model, max_steps - self._estimation_steps)
        self._enter_light(self._light_acceleration())

    # -- faster steps --------------------------------------------------------------------------------------------

    def _light_acceleration(self) -> Any:
        """What makes the steps of both parts faster, with the base's dropout that goes with it."""
        loss_alone = self._reads_loss_alone()
        return light_steps(self._peft_model, self.light_config, fast=self.fast_steps, loss_alone=loss_alone)

    def _reads_loss_alone(self) -> bool:
        """Whether nobody reads a language model's logits in training: `Trainer` does not, a loss of one's own may."""
        trainer = self._trainer
        return self.has_plain_loss() and trainer.compute_loss_func is None and trainer.label_smoother is None

    def _enter_light(self, context: Any) -> None:
        self._light_contexts.enter_context(context)

    def _leave_light(self) -> None:
        self._light_contexts.close()
        self._close_prefix()

    # -- what is said on the way ---------------------------------------------------------------------------------

    def _note_cut(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """What of the cut is there after training, and who watches is told."""
        self.light_report = {
            "estimation_steps": self._estimation_steps,
            "steps": self._trainer.state.max_steps,
            "seconds": dict(self._light_seconds),
            "parameters": {"before": before, "after": after},
        }
        tell_cut(self._trainer, before, after)

    def _warn(self, line: str) -> None:
        """Say that what comes out of training may not be what was asked for."""
        _log.warning("%s", line)

    def _note_full_width(self) -> None:
        """Say what of `light.keep` is left to the caller: the base is no longer there when training ends."""
        _log.warning(
            "light.keep is %s: after training, lightpeft.full_width(trainer.model) is that; "
            "steps at full width (full_width_steps) are any trainer's on what it gives",
            self.light_config.keep,
        )


@functools.cache
def light_trainer(trainer_class: type[AnyTrainer]) -> type[AnyTrainer]:
    """A trainer's class with Light-PEFT in its `train()`: `Trainer`, `Seq2SeqTrainer`, TRL's, a user's own.

    See `LightTraining` for what it takes beyond its own arguments, and for what it has after training.
    """
    name = f"Light{trainer_class.__name__}"
    return cast("type[AnyTrainer]", type(name, (LightTraining, trainer_class), {"__doc__": LightTraining.__doc__}))


LightTrainer = light_trainer(Trainer)
"""`transformers.Trainer` with Light-PEFT in its `train()`."""
