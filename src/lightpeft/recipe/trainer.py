"""Light-PEFT inside any `Trainer`: estimate, cut and fine-tune in one `train()`.

Read `LightTraining` from top to bottom: it follows a run from the start of training over the cut to the end.
"""

from __future__ import annotations

import copy
import functools
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments, set_seed

from lightpeft.budget.found import FoundBudget
from lightpeft.budget.trainer import budget_in
from lightpeft.budget.worth import points_per_nat
from lightpeft.compat.accelerate import without_autocast
from lightpeft.config import Light, LightConfig, Tolerance, cut_of_writer, light_config, tolerance_of
from lightpeft.errors import require
from lightpeft.models.all_weights import too_few_digits, train_all
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.planning import make_plan
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.profiling.sizes import parameter_report
from lightpeft.prune.estimation import Estimator
from lightpeft.prune.learning import unlearned_warning
from lightpeft.prune.light_model import LightModel
from lightpeft.recipe.arguments import trainer_kwargs, with_dense_reference
from lightpeft.recipe.callback import LightCallback, report_cut
from lightpeft.recipe.checkpoints import LightCheckpoints
from lightpeft.recipe.naming import with_loaded_model
from lightpeft.recipe.parallel import broadcast_from_main
from lightpeft.recipe.pruner import EarlyPruner, cut
from lightpeft.recipe.refusals import check_arguments, check_length, check_light, refuse_parts, stage_of_trainer
from lightpeft.recipe.schedule import LightSchedule
from lightpeft.recipe.settings import can_write, gives_classes, peft_config_of, settings_of_cut, settings_of_trainer
from lightpeft.recipe.teacher import Teacher, add_teacher_logits
from lightpeft.recipe.wrapping import add_peft_modules, check_trainable, inner_peft_model
from lightpeft.training.acceleration import light_steps
from lightpeft.training.fitting import upcast_trained_weights
from lightpeft.training.loss_rise import loss_rise
from lightpeft.training.prefix import PrefixCache
from lightpeft.training.step_rows import rows_per_step
from lightpeft.training.teaching import WEIGHT
from lightpeft.training.trainer import Training

_log = logging.getLogger(__name__)
AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)
FULL_WIDTH_CALL = "call lightpeft.full_width(trainer.model) after training"
"""Way to a full-width model in Python, in place of `light.after.keep: both`."""


class LightTraining(Training):
    """Mixin that `light_trainer` adds to a trainer: estimate, cut and fine-tune in one `train()`.

    The first steps train masks and PEFT modules together and score all units. Then the model is cut in place, and the
    remaining steps fine-tune it (Gu et al. 2024, https://arxiv.org/abs/2406.03792). All arguments of the trainer are
    accepted.

    Args:
        model: a dense transformers model with `peft_config`, or a PeftModel. It is cut in place.
        light: fraction of the blocks to remove, such as 0.4, "auto", a preset's name, or settings (`LightConfig`, or a
            mapping of its fields); None: no cut of a model that generates text; for others the largest cut that is
            measured to cost at most one point of accuracy or, if the model outputs no classes, 0.05 nats of the loss.
        peft_config: PEFT modules for a dense model; without `target_modules` they sit on all projections of the blocks
            in which `light` allows modules. A PeftModel needs none.
        fast_steps: use fused LoRA layers, logits of labeled tokens only, a faster backward pass through attention and
            norms on a CPU, and recomputed activations.
        prefix_cache: cache for the outputs of the frozen lower blocks from epoch to epoch; None: no cache.
        teacher: a trained model of the same task, labels and tokenizer, or its folder, for knowledge distillation: a
            model for classes, numbers, or token labels. Its logits of the training rows are computed once, before
            training. Rows with a column `teacher_logits` need no teacher. Estimation uses the labels alone.
        teacher_weight: weight of the teacher's loss in the total loss after the cut, in (0, 1]. 1: labels do not count,
            and estimation uses the teacher alone.

    Attributes:
        light_plan: the units of the dense base that were kept; None if training ended before the cut.
        light_record: the scores that the plan was made from; None if training resumed after the cut.
        light_budget: the budget that `light: auto` found, and its expected cost; None for a fixed budget.
        light_report: steps and seconds of estimation, parameters before and after the cut, and the settings of the cut.

    Raises:
        LightPeftError: a setting cannot work with a model that is cut during training; raised before training.

    Example:
        ```python
        trainer = LightTrainer(base, arguments, train_dataset=rows, peft_config=lora, light=0.4)
        trainer.train()
        trainer.save_model("adapter")
        ```
    """

    light_plan: PrunePlan | None = None
    light_record: EstimationRecord | None = None
    light_budget: FoundBudget | None = None
    light_report: dict[str, Any]
    light_longer = "num_train_epochs"
    """Name of the setting that makes training longer, for error messages."""

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
        check_arguments(options.get("train_dataset"), peft_config, fast_steps, prefix_cache)
        self.fast_steps, self.light_report = fast_steps, {}
        model, options = with_loaded_model(model, type(self), options)
        refuse_parts(model)
        if peft_config is not None:
            require(isinstance(model, nn.Module), "peft_config is put on a model that is there already; give model=")
            light = settings_of_trainer(light, peft_config, model, options)
            model = add_peft_modules(model, peft_config, light)
        super().__init__(model, *args, **with_dense_reference(options))  # type: ignore[call-arg]
        self._peft_model = inner_peft_model(self.model)
        peft = peft_config_of(self._peft_model)
        self.light_config = settings_of_trainer(light, peft, self._peft_model, options)
        check_light(self, sharded=self._sharding.fsdp)
        require(0 < teacher_weight <= 1, f"teacher_weight is {teacher_weight}; it must be in (0, 1]")
        self._teaching.weight = teacher_weight
        if teacher is not None:
            self.train_dataset = add_teacher_logits(self, teacher, self._warn)
        self.args: TrainingArguments = copy.copy(self.args)  # the user's own stay as they are
        if self.args.fp16:
            upcast_trained_weights(self.model)
        if self.light_config.idle_tolerance is not None:
            self._warn(self.light_config.idle_tolerance)
        if self.light_config.after.keep != "light":
            self._warn_about_full_width()
        self.light_plain_rate = self.args.learning_rate
        self._light_contexts = ExitStack()
        self._estimation_steps, self._light_seconds = 0, {"estimation": 0.0, "cut": 0.0}
        self._base_joined = 0
        self._light_checkpoint: str | None = None
        self._prefix.model, self._prefix.cache = self._peft_model, prefix_cache
        if isinstance(self._peft_model, LightModel):
            if light_config(light).remove.has_amount:
                self._warn("the model is cut already, so the amount in light= has no effect")
            self._light_pruner: EarlyPruner | None = None
            self.light_plan = self._peft_model.light_plan
        else:
            self._light_pruner = EarlyPruner(self._peft_model, self.light_config, self.make_light_estimator)
        check_length(self)
        self._schedule.set_rate()
        self.add_callback(LightCallback(self, self._checkpoints, self._prefix))

    @cached_property
    def _checkpoints(self) -> LightCheckpoints:
        """Checkpoints before and after the cut."""
        return LightCheckpoints(self, self._sharding)

    @cached_property
    def _schedule(self) -> LightSchedule:
        """Learning rate, optimizer and scheduler before and after the cut."""
        return LightSchedule(self)

    # -- the recipe ----------------------------------------------------------------------------------------------

    @contextmanager
    def _training(self, checkpoint: str | None) -> Iterator[None]:
        """Estimate, cut and fine-tune inside the block.

        Args:
            checkpoint: folder to resume from, written before or after the cut; None: start anew.
        """
        if self._light_pruner is None:
            check_trainable(self._peft_model)
        self._light_checkpoint = checkpoint
        if checkpoint is None:
            self._estimation_steps = self._base_joined = 0  # a light model that trains once more does so for all of it
        with super()._training(checkpoint):
            try:
                yield
            finally:
                self._light_contexts.close()
                if self._light_pruner is not None:
                    self._light_pruner.estimator.stop()
        if self._light_pruner is not None and self.light_record is None and self.light_plan is None:
            ended = f"training ended at step {self.state.global_step}, inside estimation"
            self._warn(f"{ended}: the model was not cut; train for more steps, or lower light.estimate.length")
        rise = loss_rise(self.state.log_history, self._estimation_steps)
        if rise is not None and self.has_plain_loss():  # losses of reinforcement learning may rise
            self._warn(str(rise))

    def _begin_light(self, state: TrainerState, control: TrainerControl) -> None:
        """Start or resume training: with estimation if the model is dense, with fine-tuning if it is cut."""
        if self.light_plan is None:
            self._begin_estimation(state, control)
        else:
            self._begin_fine_tuning(state.max_steps)

    # -- 1. estimation: masks and PEFT modules train together ----------------------------------------------------

    def _begin_estimation(self, state: TrainerState, control: TrainerControl) -> None:
        """Put masks on the model. If nothing is to be cut, there is nothing to estimate: the cut comes at once."""
        assert self._light_pruner is not None
        if can_write(self._peft_model) and (line := cut_of_writer(self.light_config, FULL_WIDTH_CALL)) is not None:
            self._warn(line)
        self._light_pruner.estimator.start(state.max_steps, stage_of_trainer(self, state.max_steps))
        if self._light_checkpoint is not None:
            self._light_pruner.estimator.load_state(self._light_checkpoint)
        self._light_started = time.perf_counter()
        if self._light_pruner.finished:
            self._cut(state, control)
        else:
            self._light_contexts.enter_context(self._light_acceleration())

    def make_light_estimator(self, model: PeftModel, light: LightConfig) -> Estimator:
        """Make the estimator. To be overridden."""
        return Estimator(model, light)

    def _see_labels(self, inputs: Any) -> None:
        """Show estimation the labels: with label smoothing or a custom loss, the model is called without them."""
        if self._light_pruner is not None and isinstance(inputs, Mapping):
            self._light_pruner.estimator.see_labels(inputs.get("labels"))

    def _learns_from_teacher(self) -> bool:
        """Return True after the cut: until then labels, if they count, show better what the task needs."""
        return self.light_plan is not None or self._teaching.weight == 1

    def _let_base_join(self, state: TrainerState) -> None:
        """With `light.train: all`, train all weights for the rest of estimation: PEFT alone learns nothing."""
        if self.light_config.train != "all" or self._base_joined:
            return
        self._base_joined = state.global_step
        train_all(self._peft_model)
        if self.args.fp16:
            upcast_trained_weights(self._peft_model)
        self._light_contexts.close()
        self._light_contexts.enter_context(self._light_acceleration())
        self._schedule.renew(state.max_steps)

    # -- 2. the cut, once ----------------------------------------------------------------------------------------

    def _cut(self, state: TrainerState, control: TrainerControl) -> None:
        """End estimation: make the plan, cut the model in place, and make a new optimizer and scheduler."""
        assert self._light_pruner is not None
        self._light_seconds["estimation"] = time.perf_counter() - self._light_started
        self._estimation_steps = state.global_step
        self._light_pruner.estimator.stop()
        self._light_contexts.close()
        if self._base_joined:
            train_all(self._peft_model, False)  # copies of the model that search for a budget train PEFT
        self.light_record = self._light_pruner.record()
        self.light_record.meta["rows_per_step"] = rows_per_step(self.args)
        self.light_record.meta["base_joined"] = self._base_joined
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
            upcast_trained_weights(light)  # more weights train than before
        if plan.train == "all" and (line := too_few_digits(light)) is not None:
            self._warn(line)
        self.light_plan = plan
        self._light_seconds["cut"] = time.perf_counter() - started
        self._schedule.renew(state.max_steps)
        set_seed(self.args.seed + 1)  # so that what follows does not depend on how it came here
        self._record_cut(before, parameter_report(light))
        self._begin_fine_tuning(state.max_steps)

    def make_light_plan(self, record: EstimationRecord) -> PrunePlan | None:
        """Make the plan after estimation. Override it to plan in another way.

        Args:
            record: the scores.

        Returns:
            The plan; None ends training without a cut.
        """
        light = self.light_config
        if light.is_auto:
            self.light_budget = self.find_light_budget(record, self.state.max_steps)
            self._light_seconds["budget"] = self.light_budget.seconds
            _log.log(logging.INFO if self.light_budget.blocks else logging.WARNING, "%s", self.light_budget.summary())
            light = light.with_blocks(broadcast_from_main(self.light_budget.blocks))
        return make_plan(record, light)

    def find_light_budget(self, record: EstimationRecord, steps: int) -> FoundBudget:
        """Find the largest fraction of the blocks that can be cut within the tolerance, after estimation.

        Args:
            record: the scores.
            steps: optimizer steps of the whole run.
        """
        return budget_in(self, record, steps, sharded=self._sharding.fsdp)

    def announce_light_budget(self, line: str) -> None:
        """Log one line of progress of the budget search, which may take minutes. Can be overridden."""
        _log.info("%s", line)

    def light_tolerance(self) -> Tolerance:
        """Return `light.remove.tolerance`, or its default: in points if the model outputs classes. Can be overridden.

        Raises:
            LightPeftError: the tolerance is in points, and the model outputs no classes or has a custom loss.
        """
        classes = self._uses_model_loss() and gives_classes(self._peft_model, self.train_dataset)
        asked = tolerance_of(self.light_config, classes)
        what = f'light.remove.tolerance is "{asked}", and this model or loss has no classes to count points on'
        require(classes or asked.unit == "nats", f"{what}; set it in nats of the loss")
        return asked

    def light_points_per_nat(self, classes: Tensor, right: Tensor) -> float:
        """Return the points of the metric per nat of the loss. Override it for other metrics than accuracy.

        Args:
            classes: predicted class numbers of held-out rows, [rows].
            right: class numbers of their labels, [rows].
        """
        known = max(2, 1 + int(torch.cat([classes, right]).max()))
        return points_per_nat(right.cpu().numpy(), classes.cpu().numpy(), known)

    def prune_light_model(self, plan: PrunePlan) -> LightModel:
        """Cut the model in place to the plan, and return it. Override it to change the model before or after."""
        return cut(self._peft_model, plan)

    # -- 3. fine-tuning of what is left --------------------------------------------------------------------------

    def _begin_fine_tuning(self, max_steps: int) -> None:
        """Start or resume the training of the cut model."""
        self._prefix.open(max_steps - self._estimation_steps)
        self._light_contexts.enter_context(self._light_acceleration())

    # -- faster steps --------------------------------------------------------------------------------------------

    def _light_acceleration(self) -> Any:
        """Return a context with the faster steps and the base's dropout, for estimation and fine-tuning."""
        alone = self._uses_model_loss()
        return light_steps(self._peft_model, self.light_config, fast=self.fast_steps, loss_only=alone)

    def _uses_model_loss(self) -> bool:
        """Return True if the loss is the model's own; a custom loss may read all logits."""
        return self.has_plain_loss() and self.compute_loss_func is None and self.label_smoother is None

    # -- reports and warnings ------------------------------------------------------------------------------------

    def _record_cut(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Store the report on the cut, and log the parameter counts."""
        self.light_report = {
            "estimation_steps": self._estimation_steps,
            "steps": self.state.max_steps,
            "seconds": dict(self._light_seconds),
            "parameters": {"before": before, "after": after},
            "light": settings_of_cut(self.light_config),
        }
        report_cut(self, before, after)

    def _warn(self, line: str) -> None:
        """Warn that the result of training may differ from what the settings ask for."""
        _log.warning("%s", line)

    def _warn_about_full_width(self) -> None:
        """Warn that `light.after.keep` is left to the caller: the dense base is gone when training ends."""
        _log.warning(
            "light.after.keep: %s is not done by the trainer; %s, and train its result with any trainer for "
            "full_width_steps",
            self.light_config.after.keep,
            FULL_WIDTH_CALL,
        )


@functools.cache
def light_trainer(trainer_class: type[AnyTrainer]) -> type[AnyTrainer]:
    """Return a subclass of a trainer with Light-PEFT in its `train()`.

    `LightTraining` lists the additional arguments, and the attributes after training.

    Args:
        trainer_class: `Trainer`, `Seq2SeqTrainer`, a trainer of TRL or sentence-transformers, or your own subclass.

    Example:
        ```python
        from trl import SFTTrainer
        trainer = light_trainer(SFTTrainer)(model, args, train_dataset=rows, peft_config=lora, light=0.2)
        trainer.train()
        ```
    """
    given = isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)
    require(given, f"light_trainer got {trainer_class!r}; give it a subclass of transformers.Trainer")
    if issubclass(trainer_class, LightTraining):
        return trainer_class
    name = f"Light{trainer_class.__name__}"
    return cast("type[AnyTrainer]", type(name, (LightTraining, trainer_class), {"__doc__": LightTraining.__doc__}))


LightTrainer = light_trainer(Trainer)
"""`transformers.Trainer` with Light-PEFT in its `train()`."""
