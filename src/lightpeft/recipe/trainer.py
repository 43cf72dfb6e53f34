"""Light-PEFT inside any `Trainer`: estimate, cut and fine-tune in one `train()`.

Read `LightTraining` from top to bottom: what happens where training begins, at the cut, and at the end.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from lightpeft.compat.accelerate import as_it_is, forget_optimizers, prepared
from lightpeft.config import LightConfig, Tolerance
from lightpeft.errors import require
from lightpeft.files import replacing_folder
from lightpeft.models.on_disk import has_weights_on_disk
from lightpeft.models.sharding import is_sharded
from lightpeft.peft_kinds.sites import own_adapter
from lightpeft.plans.planning import make_plan
from lightpeft.plans.records import EstimationRecord, PrunePlan
from lightpeft.profiling.sizes import parameter_report
from lightpeft.prune.budgeting import FoundBudget, find_budget
from lightpeft.prune.estimation import Estimator
from lightpeft.prune.length import fitted
from lightpeft.prune.refit import calibration_batches
from lightpeft.recipe.parallel import agreed, refuse_deepspeed, rewrap
from lightpeft.recipe.probes import make_probe, rows_aside
from lightpeft.recipe.pruner import EarlyPruner, EstimationCallback, cut, light_settings
from lightpeft.recipe.resuming import cut_as_saved, load_inside, read_cut, save_outside, write_cut
from lightpeft.recipe.wrapping import inner_peft_model, with_peft
from lightpeft.saved.light_adapter import LightModel
from lightpeft.training.acceleration import light_steps
from lightpeft.training.arguments import half_precision
from lightpeft.training.prefix import PrefixCache, PrefixMixin
from lightpeft.training.schedule import Pace
from lightpeft.training.sharding import ShardingMixin
from lightpeft.training.step_rows import check_step, rows_a_step, write_step
from lightpeft.training.trainer import Repeatable, meeting_others, train_in_float32

_log = logging.getLogger(__name__)
AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)
USUAL_NATS = "0.05 nats"
"""`light.tolerance: auto` where all that is known is the loss."""


class LightTraining(PrefixMixin, ShardingMixin, Repeatable):
    """What `light_trainer` adds to a trainer: its first steps find out what the task needs, then the model is cut.

    It takes all arguments of the trainer. What it finds is there after training.

    Args:
        light: a preset's name, or a `LightConfig`.
        peft_config: PEFT modules for a dense model; without `target_modules` they sit on all projections of the blocks
            in which `light` lets modules stay. A model that is a PeftModel needs none.
        fast_steps: fused LoRA layers, a language model's head for labelled tokens alone, attention for short rows.
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

    def __init__(
        self,
        model: Any = None,
        *args: Any,
        light: str | LightConfig = "default",
        peft_config: PeftConfig | None = None,
        fast_steps: bool = True,
        prefix_cache: PrefixCache | None = PrefixCache(),  # noqa: B008 (frozen)
        **options: Any,
    ) -> None:
        named, args = _by_name(super().__init__, args)
        options = dict(**named, **options)
        given_optimizers = options.get("optimizers") or (None, None)
        require(
            given_optimizers == (None, None),
            "an optimizer or a scheduler made before cannot follow the cut; leave optimizers out and say which one by "
            "args.optim and args.lr_scheduler_type, or by optimizer_cls_and_kwargs",
        )
        require(options.get("model_init") is None, "model_init makes a dense model anew for each trial; give the model")
        settings = light_settings(light, peft_config)
        if peft_config is not None and isinstance(model, nn.Module):
            model = with_peft(model, peft_config, settings)
        elif peft_config is not None:  # a name, from which TRL's trainers load
            options["peft_config"] = peft_config
        self.fast_steps, self.prefix_cache, self.light_report = fast_steps, prefix_cache, {}
        super().__init__(model, *args, **_with_dense_reference(options))  # type: ignore[call-arg]
        self._peft_model = inner_peft_model(self._trainer.model)
        self.light_config = light_settings(light, self._peft_model.peft_config[own_adapter(self._peft_model)])
        self._check_light()
        self._trainer.args = copy.copy(self._trainer.args)  # the user's own stay as they are
        if self._trainer.args.fp16:
            train_in_float32(self._trainer.model)
        if self.light_config.keep != "light":
            self._note_full_width()
        self._scale_rate(self.light_config.learning_rate_scale)
        self._light_contexts = ExitStack()
        self._estimation_steps, self._light_seconds = 0, {"estimation": 0.0, "cut": 0.0}
        self._light_checkpoint: str | None = None
        if isinstance(self._peft_model, LightModel):
            self._light_pruner: EarlyPruner | None = None
            self.light_plan = self._peft_model.light_plan
        else:
            self._light_pruner = EarlyPruner(self._peft_model, self.light_config, self.make_light_estimator)
        self._trainer.add_callback(_Course(self))

    def create_accelerator_and_postprocess(self) -> None:
        """The trainer's own.

        Raises:
            LightPeftError: DeepSpeed is asked for, or FSDP in a way in which it cannot be had.
        """
        refuse_deepspeed(self._trainer.args.deepspeed)
        super().create_accelerator_and_postprocess()

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
                self._before_sharding(self._light_checkpoint)
                result = super().train(self._light_checkpoint, *args, **options)  # type: ignore[misc]
            if self._light_pruner is not None and self.light_record is None and self.light_plan is None:
                self._warn_uncut(self._trainer.state.global_step)
            return result
        finally:
            self._leave_light()
            if self._light_pruner is not None:
                self._light_pruner.estimator.stop()

    def _warn_uncut(self, step: int) -> None:
        """Say that what comes out of training is not what was asked for."""
        _log.warning("training ended at step %d, inside estimation: the model is the dense one still", step)

    def _note_full_width(self) -> None:
        """Say what of `light.keep` is left to the caller: the base is no longer there when training ends."""
        _log.warning(
            "light.keep is %s: after training, lightpeft.full_width(trainer.model) is that; "
            "steps at full width (full_width_steps) are any trainer's on what it gives",
            self.light_config.keep,
        )

    def _begin_light(self, state: TrainerState) -> None:
        """Training begins, or goes on from a checkpoint: with estimation, or behind the cut."""
        if self.light_plan is not None:
            self._begin_light_fine_tuning(state.max_steps)
            return
        assert self._light_pruner is not None
        settings = fitted(self.light_config, self._light_pace(), state.max_steps)
        self._light_pruner.config = self._light_pruner.estimator.config = settings
        self._light_pruner.estimator.start(state.max_steps)
        if self._light_checkpoint is not None:
            self._light_pruner.estimator.load_state(self._light_checkpoint)
        self._enter_light(self._light_acceleration())
        self._light_started = time.perf_counter()

    def make_light_estimator(self, model: PeftModel, light: LightConfig) -> Estimator:
        """What estimates. To be overridden."""
        return Estimator(model, light)

    def make_light_plan(self, record: EstimationRecord) -> PrunePlan | None:
        """What stays, decided once, when estimation is over; None ends training without a cut. To be overridden."""
        light = self.light_config
        if light.blocks == "auto":
            self.light_budget = self.find_light_budget(record, self._trainer.state.max_steps)
            self._light_seconds["budget"] = self.light_budget.seconds
            _log.info("%s", self.light_budget.summary())
            light = replace(light, blocks=agreed(self.light_budget.blocks))
        return make_plan(record, light)

    def find_light_budget(self, record: EstimationRecord, steps: int) -> FoundBudget:
        """The largest part of the blocks that may go within `light.tolerance`, for the model as estimation left it.

        Args:
            steps: of the whole run.
        """
        started = time.perf_counter()
        seen = self.rows_of_steps(record.meta["steps"])
        probe = make_probe(self._trainer, self.light_config, steps, seen, self.fast_steps)
        tolerance = self.light_tolerance_in_nats(probe.rows)
        found = find_budget(self._peft_model, record, self.light_config, probe, tolerance)
        return replace(found, seconds=time.perf_counter() - started)

    def light_tolerance(self) -> Tolerance:
        """`light.tolerance`, or the usual one. To be overridden.

        Raises:
            LightPeftError: it is one of points, and what a trainer has is a loss.
        """
        tolerance = self.light_config.tolerance
        asked = Tolerance.read(USUAL_NATS if tolerance == "auto" else tolerance)
        require(asked.unit == "nats", f'light.tolerance is "{asked}"; a trainer knows of its loss alone: give nats')
        return asked

    def light_tolerance_in_nats(self, rows: Sequence[int]) -> float:
        """The same as a rise of the loss. To be overridden.

        Args:
            rows: numbers of training rows that are set aside.
        """
        return self.light_tolerance().amount

    def _cut(self, state: TrainerState, control: TrainerControl) -> None:
        """Estimation is over: plan, cut the model in place, and go on with a new optimizer and schedule."""
        assert self._light_pruner is not None
        self._light_seconds["estimation"] = time.perf_counter() - self._light_started
        self._estimation_steps = state.global_step
        self._light_pruner.estimator.stop()
        self._leave_light()
        self.light_record = self._light_pruner.record()
        self.light_record.meta["rows_a_step"] = rows_a_step(self._trainer.args)
        plan = self.make_light_plan(self.light_record)
        if plan is None:
            control.should_training_stop = True
            return
        started = time.perf_counter()
        before = parameter_report(self._peft_model)
        with as_it_is(self._peft_model):
            light = self.prune_light_model(plan)
        self.light_plan = plan
        self._light_seconds["cut"] = time.perf_counter() - started
        self._renew_optimizer(state.max_steps)
        set_seed(self._trainer.args.seed + 1)  # so that what follows does not depend on how it came here
        self._report_cut(before, parameter_report(light))
        self._begin_light_fine_tuning(state.max_steps)

    def prune_light_model(self, plan: PrunePlan) -> LightModel:
        """Cut the model down to the plan, in place. To be overridden."""
        return cut(self._peft_model, plan, self.light_config, self.calibration)

    def calibration(self) -> Iterator[dict[str, Tensor]]:
        """Batches of some training rows, for `light.refit`."""
        trainer, args = self._trainer, self._trainer.args
        rows: Any = self._prefix_rows if self._prefix_rows is not None else trainer.train_dataset
        return calibration_batches(
            rows, trainer.data_collator, self.light_config.refit_rows, args.seed, args.eval_batch_size, args.device
        )

    def _begin_light_fine_tuning(self, max_steps: int) -> None:
        self._open_prefix(self._peft_model, max_steps - self._estimation_steps)
        self._enter_light(self._light_acceleration())

    def _light_acceleration(self) -> Any:
        """What makes the steps of both parts faster, with the base's dropout that goes with it."""
        args = self._trainer.args
        return light_steps(
            self._peft_model,
            self.light_config,
            fast=self.fast_steps,
            autocast=half_precision(args),
            loss_alone=self._reads_loss_alone(),
        )

    def _reads_loss_alone(self) -> bool:
        """Whether nobody reads a language model's logits in training: `Trainer` does not, TRL's trainers do."""
        trainer = self._trainer
        own = type(self).compute_loss is Trainer.compute_loss  # type: ignore[attr-defined]
        return own and trainer.compute_loss_func is None and trainer.label_smoother is None

    def _enter_light(self, context: Any) -> None:
        self._light_contexts.enter_context(context)

    def _leave_light(self) -> None:
        self._light_contexts.close()
        self._close_prefix()

    # -- optimizer, schedule, log --------------------------------------------------------------------------------

    def _renew_optimizer(self, max_steps: int) -> None:
        """The parameters are others now."""
        trainer = self._trainer
        rewrap(trainer)
        forget_optimizers(trainer.accelerator)
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.create_optimizer()
        trainer.optimizer = prepared(trainer.accelerator, trainer.model, trainer.optimizer)
        trainer.create_scheduler(num_training_steps=max_steps)
        for name in ("optimizer", "lr_scheduler"):
            setattr(trainer.callback_handler, name, getattr(trainer, name))

    def _scale_rate(self, scale: float) -> None:
        trainer = self._trainer
        trainer.args.learning_rate *= scale
        if trainer.optimizer_cls_and_kwargs is not None:
            kind, settings = trainer.optimizer_cls_and_kwargs
            scaled = {"lr": settings["lr"] * scale} if "lr" in settings else {}
            trainer.optimizer_cls_and_kwargs = kind, {**settings, **scaled}

    def create_scheduler(self, num_training_steps: int, *args: Any, **options: Any) -> Any:
        """The trainer's own, over the whole run for estimation, and over the steps that are left after the cut."""
        left = num_training_steps - (self._estimation_steps if self.light_plan is not None else 0)
        return super().create_scheduler(left, *args, **options)  # type: ignore[misc]

    def _report_cut(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Report the cut to whoever watches, and let what was best before it count no more."""
        trainer = self._trainer
        self.light_report = {
            "estimation_steps": self._estimation_steps,
            "steps": trainer.state.max_steps,
            "seconds": dict(self._light_seconds),
            "parameters": {"before": before, "after": after},
        }
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

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save_course(self, folder: Path, write: bool) -> None:
        """Put what a resumed run needs beside what the trainer has written into a checkpoint."""
        if self.light_plan is None:
            assert self._light_pruner is not None
            self._light_pruner.estimator.save_state(folder, write=write)
        elif write:
            write_cut(folder, {**self.light_report, "estimation_steps": self._estimation_steps})
        if write:
            write_step(folder, self._trainer.args)
        if write and self._holds_peft_model:
            save_outside(self._trainer.model, self._peft_model, folder)

    def checkpoint_at_cut(self, estimation_steps: int, max_steps: int) -> Path:
        """Write a checkpoint of a light model from which training goes on behind the cut, and nothing happened since.

        Args:
            estimation_steps: steps that estimation has taken.
            max_steps: of the whole run.

        Returns:
            The checkpoint, among the trainer's own.
        """
        trainer, pace = self._trainer, self._light_pace()
        folder = Path(trainer.args.output_dir) / f"checkpoint-{estimation_steps}"
        state = copy.copy(trainer.state)
        state.global_step, state.max_steps = estimation_steps, max_steps
        state.epoch = estimation_steps / pace.steps_an_epoch if pace is not None else 0.0
        state.train_batch_size = trainer.args.train_batch_size
        state.compute_steps(trainer.args, max_steps)
        if trainer.is_world_process_zero():
            with replacing_folder(folder) as temporary:
                self._peft_model.save_pretrained(temporary)
                write_cut(temporary, {"estimation_steps": estimation_steps})
                write_step(temporary, trainer.args)
                state.save_to_json(str(temporary / TRAINER_STATE_NAME))
        trainer.accelerator.wait_for_everyone()
        return folder

    def _load_from_checkpoint(self, folder: str, *args: Any, **options: Any) -> None:
        if is_sharded(self._trainer.model):  # `train` did it before
            return
        report = read_cut(Path(folder))
        if report is not None:
            self.light_report, self._estimation_steps = report, int(report["estimation_steps"])
            if self._light_pruner is not None and self.light_plan is None:
                self.light_plan = cut_as_saved(self._peft_model, self._light_pruner.estimator.fingerprint, Path(folder))
        if self._holds_peft_model:
            load_inside(self._trainer.model, self._peft_model, Path(folder))
        else:
            super()._load_from_checkpoint(folder, *args, **options)

    def _load_best_model(self) -> None:
        if self._holds_peft_model:
            load_inside(self._trainer.model, self._peft_model, Path(self._trainer.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)  # type: ignore[misc]
        unknown = checkpoint is not None and not any(Path(checkpoint).glob("rng_state*"))
        if unknown and self._trainer.state.global_step == self._estimation_steps:  # nobody has drawn a number since
            set_seed(self._trainer.args.seed + 1)

    @property
    def _holds_peft_model(self) -> bool:
        """Whether the PeftModel is a part of the trainer's model, which then saves and loads in its own way."""
        return self._peft_model is not self._trainer.model

    # -- what cannot work ----------------------------------------------------------------------------------------

    def _check_light(self) -> None:
        trainer, args = self._trainer, self._trainer.args
        engines = {
            "torch.compile": args.torch_compile,
            "DataParallel in one process": args.n_gpu > 1,
            "auto_find_batch_size": args.auto_find_batch_size,
        }
        found = next((name for name, used in engines.items() if used), None)
        hint = "; start one process a GPU with accelerate launch" if found and found.startswith("DataParallel") else ""
        require(found is None, f"{found} cannot follow a model that is cut on the way; train without it{hint}")
        alone = "weights on disk are for training in one process; load the model without weights_on_disk"
        require(args.world_size == 1 or not has_weights_on_disk(trainer.model), alone)
        if self._shards:
            self._check_sharded()
        if self.light_config.blocks == "auto" and self.light_plan is None:
            self.light_tolerance()
            rows_aside(trainer, 0)
        reference = getattr(trainer, "ref_model", trainer) is None and not getattr(args, "precompute_ref_log_probs", 0)
        require(
            not reference or not getattr(args, "beta", 0),
            f"{type(self).__name__} would take the cut model as its own reference; give the dense one as ref_model=, "
            "or set beta to 0",
        )

    def _check_sharded(self) -> None:
        light, trainer = self.light_config, self._trainer
        probes = "light.blocks: auto probes copies of the model, which cannot be made of one that FSDP shards"
        require(light.blocks != "auto" or self.light_plan is not None, f"{probes}; give light.blocks as a number")
        kept = f"light.keep: {light.keep} needs the whole base in every process, which FSDP spares"
        require(light.keep == "light", f"{kept}; set it to light")
        quantised = any(getattr(module, "is_quantized", False) for module in trainer.model.modules())
        require(not quantised, "a base in 4 or 8 bits cannot be cut where FSDP shards it; give it unquantised")

    def _light_pace(self) -> Pace | None:
        """How fast training goes through its rows; None where these are not counted."""
        trainer, args = self._trainer, self._trainer.args
        try:
            rows = len(trainer.train_dataset)
        except TypeError:
            return None
        return Pace(rows, args.train_batch_size * args.world_size, args.gradient_accumulation_steps)


def _by_name(init: Callable[..., None], args: tuple[Any, ...]) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """A trainer's positional arguments behind its model: by their names, and those that have none."""
    _, *behind = inspect.signature(init).parameters.values()
    names = [each.name for each in behind if each.kind is each.POSITIONAL_OR_KEYWORD]
    return dict(zip(names, args, strict=False)), args[len(names) :]


def _with_dense_reference(options: dict[str, Any]) -> dict[str, Any]:
    """The options, by which a preference trainer without a reference model asks the dense model before training."""
    settings: Any = options.get("args")
    if getattr(settings, "precompute_ref_log_probs", True) or options.get("ref_model") is not None:
        return options
    _log.info("the reference's log-probabilities are computed once, before training, by the dense model")
    settings = copy.copy(settings)
    settings.precompute_ref_log_probs = True
    return {**options, "args": settings}


class _Course(EstimationCallback):
    """Calls the recipe where the trainer is at the right place."""

    def __init__(self, training: LightTraining) -> None:
        self.training = training

    @property
    def _estimating(self) -> bool:
        return self.training.light_plan is None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training._begin_light(state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._estimating:
            super().on_pre_optimizer_step(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._estimating and self.estimator.finished:
            self.training._cut(state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._estimating and control.should_training_stop:
            control.should_training_stop = False  # early stopping may stop the training of the light model alone

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._estimating and self.estimator.steps:
            super().on_log(args, state, control, **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.training._save_course(
            Path(args.output_dir) / f"checkpoint-{state.global_step}", write=state.is_world_process_zero
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training._remove_prefix_file()

    @property
    def estimator(self) -> Any:  # type: ignore[override]
        pruner = self.training._light_pruner
        assert pruner is not None
        return pruner.estimator


@functools.cache
def light_trainer(trainer_class: type[AnyTrainer]) -> type[AnyTrainer]:
    """A trainer's class with Light-PEFT in its `train()`: `Trainer`, `Seq2SeqTrainer`, TRL's, a user's own.

    See `LightTraining` for what it takes beyond its own arguments, and for what it has after training.
    """
    name = f"Light{trainer_class.__name__}"
    return cast("type[AnyTrainer]", type(name, (LightTraining, trainer_class), {"__doc__": LightTraining.__doc__}))


LightTrainer = light_trainer(Trainer)
"""`transformers.Trainer` with Light-PEFT in its `train()`."""
