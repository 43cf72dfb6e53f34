"""Light-PEFT inside any `Trainer`: estimate, cut and fine-tune in one `train()`.

Read `LightTraining` from top to bottom: what happens where training begins, at the cut, and at the end.
"""

from __future__ import annotations

import copy
import functools
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments, set_seed

from lightpeft.budget.found import FoundBudget
from lightpeft.budget.trainer import budget_in
from lightpeft.budget.worth import points_a_nat
from lightpeft.compat.accelerate import without_autocast
from lightpeft.config import Light, LightConfig, Tolerance, cut_of_writer, tolerance_of
from lightpeft.errors import require
from lightpeft.models.all_weights import too_few_digits
from lightpeft.plans.planning import make_plan
from lightpeft.plans.records import EstimationRecord, PrunePlan
from lightpeft.profiling.sizes import parameter_report
from lightpeft.prune.estimation import Estimator
from lightpeft.prune.learning import unlearned_warning
from lightpeft.prune.length import fit_stage
from lightpeft.prune.light_model import LightModel
from lightpeft.recipe.arguments import trainer_kwargs, with_dense_reference
from lightpeft.recipe.checkpoints import LightCheckpoints
from lightpeft.recipe.course import Course, tell_cut
from lightpeft.recipe.naming import with_loaded_model
from lightpeft.recipe.parallel import broadcast_from_main
from lightpeft.recipe.pruner import EarlyPruner, cut
from lightpeft.recipe.refusals import check_length, check_light, refuse_parts
from lightpeft.recipe.schedule import LightSchedule
from lightpeft.recipe.settling import can_write, gives_classes, peft_config_of, settings_of_trainer
from lightpeft.recipe.teacher import Teacher, taught_rows
from lightpeft.recipe.wrapping import inner_peft_model, with_peft
from lightpeft.training.acceleration import light_steps
from lightpeft.training.fitting import train_in_float32
from lightpeft.training.prefix import PrefixCache
from lightpeft.training.schedule import pace_of
from lightpeft.training.step_rows import rows_a_step
from lightpeft.training.teaching import WEIGHT
from lightpeft.training.trainer import Training

_log = logging.getLogger(__name__)
AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


class LightTraining(Training):
    """What `light_trainer` adds to a trainer: its first steps find out what the task needs, then the model is cut.

    It takes all arguments of the trainer. What it finds is there after training. The methods of `Trainer` that this
    needs are extended in `Training`.

    Args:
        light: part of the blocks to remove, such as 0.4, "auto", a preset's name, or settings (`LightConfig`, or a
            mapping of its fields); None: of a model that writes its answers nothing goes, and of others what is
            measured to cost no more than one point of accuracy or, where answers are no classes, 0.05 nats.
        peft_config: PEFT modules for a dense model; without `target_modules` they sit on all projections of the blocks
            in which `light` lets modules stay. A model that is a PeftModel needs none.
        fast_steps: fused LoRA layers, a language model's head for labelled tokens alone, fewer steps back through
            attention and norms on a CPU, and activations that the backward pass makes again.
        prefix_cache: how the outputs of the frozen lower blocks are kept from epoch to epoch; None: not at all.
        teacher: a trained model of the same task, labels and tokenizer, or its folder, whose logits the model learns
            beside the labels: a model that gives classes, numbers, or a class a token. It is asked about the training
            rows once, before training. Rows that have a column `teacher_logits` need none.
        teacher_weight: part of the loss that is the teacher's, in (0, 1].

    Attributes:
        light_plan: which units of the dense base are left; None where training ended before the cut.
        light_record: the scores behind it; None where training went on from behind the cut.
        light_budget: what `light: auto` found, and what that is expected to cost; None otherwise.
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
        light: Light = None,
        peft_config: PeftConfig | None = None,
        fast_steps: bool = True,
        prefix_cache: PrefixCache | None = PrefixCache(),  # noqa: B008 (frozen)
        teacher: Teacher | None = None,
        teacher_weight: float = WEIGHT,
        **options: Any,
    ) -> None:
        args, options = trainer_kwargs(super().__init__, args, options)
        self.fast_steps, self.light_report = fast_steps, {}
        model, options = with_loaded_model(model, type(self), options)
        refuse_parts(model)
        if peft_config is not None:
            light = settings_of_trainer(light, peft_config, model, options)
            model = with_peft(model, peft_config, light)
        super().__init__(model, *args, **with_dense_reference(options))  # type: ignore[call-arg]
        self._peft_model = inner_peft_model(self.model)
        peft = peft_config_of(self._peft_model)
        self.light_config = settings_of_trainer(light, peft, self._peft_model, options)
        check_light(self, sharded=self._sharding.fsdp)
        require(0 < teacher_weight <= 1, f"teacher_weight is {teacher_weight}; it lies in (0, 1]")
        self._teaching.weight = teacher_weight
        if teacher is not None:
            self.train_dataset = taught_rows(self, teacher)
        self.args: TrainingArguments = copy.copy(self.args)  # the user's own stay as they are
        if self.args.fp16:
            train_in_float32(self.model)
        if self.light_config.after.keep != "light":
            self._note_full_width()
        self.light_plain_rate = self.args.learning_rate
        self._light_contexts = ExitStack()
        self._estimation_steps, self._light_seconds = 0, {"estimation": 0.0, "cut": 0.0}
        self._light_checkpoint: str | None = None
        self._prefix.model, self._prefix.cache = self._peft_model, prefix_cache
        if isinstance(self._peft_model, LightModel):
            self._light_pruner: EarlyPruner | None = None
            self.light_plan = self._peft_model.light_plan
        else:
            self._light_pruner = EarlyPruner(self._peft_model, self.light_config, self.make_light_estimator)
        check_length(self)
        self._schedule.set_rate()
        self.add_callback(Course(self, self._checkpoints, self._prefix))

    @cached_property
    def _checkpoints(self) -> LightCheckpoints:
        """Those on both sides of the cut."""
        return LightCheckpoints(self, self._sharding)

    @cached_property
    def _schedule(self) -> LightSchedule:
        """One optimizer and one schedule before the cut, others behind it."""
        return LightSchedule(self)

    # -- the recipe ----------------------------------------------------------------------------------------------

    @contextmanager
    def _training(self, checkpoint: str | None) -> Iterator[None]:
        """Estimate, cut and fine-tune inside the block; the checkpoint may lie on either side of the cut."""
        self._light_checkpoint = checkpoint
        if checkpoint is None:
            self._estimation_steps = 0  # a light model that trains once more does so for the whole of it
        with super()._training(checkpoint):
            try:
                yield
            finally:
                self._light_contexts.close()
                if self._light_pruner is not None:
                    self._light_pruner.estimator.stop()
        if self._light_pruner is not None and self.light_record is None and self.light_plan is None:
            ended = f"training ended at step {self.state.global_step}, inside estimation"
            self._warn(f"{ended}: the model is the dense one still")

    def _begin_light(self, state: TrainerState, control: TrainerControl) -> None:
        """Training begins, or goes on from a checkpoint: with estimation, or behind the cut."""
        if self.light_plan is None:
            self._begin_estimation(state, control)
        else:
            self._begin_fine_tuning(state.max_steps)

    # -- 1. estimation: masks and PEFT modules train together ----------------------------------------------------

    def _begin_estimation(self, state: TrainerState, control: TrainerControl) -> None:
        """Put masks on the model. Where nothing is to go there is nothing to estimate: it is a light one at once."""
        assert self._light_pruner is not None
        if can_write(self._peft_model) and (line := cut_of_writer(self.light_config)) is not None:
            self._warn(line)
        stage = fit_stage(self.light_config, pace_of(self), state.max_steps, longer=self.light_longer)
        self._light_pruner.estimator.start(state.max_steps, stage)
        if self._light_checkpoint is not None:
            self._light_pruner.estimator.load_state(self._light_checkpoint)
        self._light_started = time.perf_counter()
        if self._light_pruner.finished:
            self._cut(state, control)
        else:
            self._light_contexts.enter_context(self._light_acceleration())

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
        self._light_contexts.close()
        self.light_record = self._light_pruner.record()
        self.light_record.meta["rows_a_step"] = rows_a_step(self.args)
        plan = self.make_light_plan(self.light_record)
        if plan is None:
            control.should_training_stop = True
            return
        line = unlearned_warning(self.light_record) if plan.removed_of_blocks else None
        if line is not None:
            self._warn(line)
        started = time.perf_counter()
        before = parameter_report(self._peft_model)
        with without_autocast(self._peft_model), self._sharding.answering():
            light = self.prune_light_model(plan)
        if self.args.fp16:
            train_in_float32(light)  # more weights train than before
        if plan.train == "all" and (line := too_few_digits(light)) is not None:
            self._warn(line)
        self.light_plan = plan
        self._light_seconds["cut"] = time.perf_counter() - started
        self._schedule.renew(state.max_steps)
        set_seed(self.args.seed + 1)  # so that what follows does not depend on how it came here
        self._note_cut(before, parameter_report(light))
        self._begin_fine_tuning(state.max_steps)

    def make_light_plan(self, record: EstimationRecord) -> PrunePlan | None:
        """What stays, decided once, when estimation is over; None ends training without a cut. To be overridden."""
        light = self.light_config
        if light.is_auto:
            self.light_budget = self.find_light_budget(record, self.state.max_steps)
            self._light_seconds["budget"] = self.light_budget.seconds
            _log.log(logging.INFO if self.light_budget.blocks else logging.WARNING, "%s", self.light_budget.summary())
            light = light.removing(broadcast_from_main(self.light_budget.blocks))
        return make_plan(record, light)

    def find_light_budget(self, record: EstimationRecord, steps: int) -> FoundBudget:
        """The largest part of the blocks that may go within the tolerance, for the model as estimation left it.

        Args:
            steps: of the whole run.
        """
        return budget_in(self, record, steps, sharded=self._sharding.fsdp)

    def announce_light_budget(self, line: str) -> None:
        """Say how far the search has come, which may take minutes. To be overridden."""
        _log.info("%s", line)

    def light_tolerance(self) -> Tolerance:
        """`light.remove.tolerance`, or the usual one: of points where answers are classes. To be overridden.

        Raises:
            LightPeftError: it is of points, and the model gives no classes by a loss that is known.
        """
        classes = self._has_models_loss() and gives_classes(self._peft_model, self.train_dataset)
        asked = tolerance_of(self.light_config, classes)
        what = f'light.remove.tolerance is "{asked}", and the trainer knows of no classes'
        require(classes or asked.unit == "nats", f"{what}; give nats of the loss")
        return asked

    def light_points_a_nat(self, classes: Tensor, right: Tensor) -> float:
        """Points of the task's metric, which is accuracy, that a nat of its loss is worth. To be overridden.

        Args:
            classes: that the model gives rows which are set aside, [rows].
            right: the classes that these have, [rows].
        """
        known = max(2, 1 + int(torch.cat([classes, right]).max()))
        return points_a_nat(right.cpu().numpy(), classes.cpu().numpy(), known)

    def prune_light_model(self, plan: PrunePlan) -> LightModel:
        """Cut the model down to the plan, in place. To be overridden."""
        return cut(self._peft_model, plan)

    # -- 3. fine-tuning of what is left --------------------------------------------------------------------------

    def _begin_fine_tuning(self, max_steps: int) -> None:
        """Training of the cut model begins, or goes on from a checkpoint."""
        self._prefix.open(max_steps - self._estimation_steps)
        self._light_contexts.enter_context(self._light_acceleration())

    # -- faster steps --------------------------------------------------------------------------------------------

    def _light_acceleration(self) -> Any:
        """What makes the steps of both parts faster, with the base's dropout that goes with it."""
        alone = self._has_models_loss()
        return light_steps(self._peft_model, self.light_config, fast=self.fast_steps, loss_alone=alone)

    def _has_models_loss(self) -> bool:
        """Whether the loss is what the model makes of its labels, and nobody reads logits: one's own loss may."""
        return self.has_plain_loss() and self.compute_loss_func is None and self.label_smoother is None

    # -- what is said on the way ---------------------------------------------------------------------------------

    def _note_cut(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """What of the cut is there after training, and who watches is told."""
        self.light_report = {
            "estimation_steps": self._estimation_steps,
            "steps": self.state.max_steps,
            "seconds": dict(self._light_seconds),
            "parameters": {"before": before, "after": after},
        }
        tell_cut(self, before, after)

    def _warn(self, line: str) -> None:
        """Say that what comes out of training may not be what was asked for."""
        _log.warning("%s", line)

    def _note_full_width(self) -> None:
        """Say what of `light.after.keep` is left to the caller: the base is no longer there when training ends."""
        _log.warning(
            "light.after.keep is %s: after training, lightpeft.full_width(trainer.model) is that; "
            "steps at full width (full_width_steps) are any trainer's on what it gives",
            self.light_config.after.keep,
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
