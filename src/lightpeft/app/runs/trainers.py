"""The trainers of a run: the public trainers, with the run's folder, log and measurements."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState

from lightpeft.app.evaluation.scores import scores_of
from lightpeft.app.runs.stages import StageCost, write_budget, write_estimation, write_plan, write_pruned
from lightpeft.app.runs.stopping import held_out_loss, stopping_arguments, stopping_callbacks
from lightpeft.app.runs.workspace import Workspace
from lightpeft.app.tasks.answers import Answers
from lightpeft.app.tasks.worth import points_per_nat
from lightpeft.config import Tolerance
from lightpeft.errors import LightPeftError, one_line, require
from lightpeft.machine import autocast_dtype, processes, sharding_launched
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.profiling.memory import PeakMemory
from lightpeft.profiling.other_work import OtherWork
from lightpeft.prune.light_model import LightModel
from lightpeft.recipe.trainer import light_trainer
from lightpeft.training.acceleration import light_steps
from lightpeft.training.arguments import half_precision, training_arguments
from lightpeft.training.callbacks import LogLines, ProgressBar, SealCheckpoint
from lightpeft.training.fitting import reporting_lost_processes, upcast_trained_weights
from lightpeft.training.packing import keeps_rows_apart
from lightpeft.training.step_rows import write_step
from lightpeft.training.trainer import Training


class Meter:
    """Measures time, speed and peak memory of a part of training."""

    def __init__(self, work: Workspace, model: nn.Module, step: int, resumed: bool, before: float = 0.0) -> None:
        """
        Args:
            step: step of the run at which the part begins.
            resumed: True if an earlier process began the part.
            before: seconds to add, such as those of storing a frozen prefix.
        """
        self._work, self._begun, self._resumed, self._before = work, step, resumed, before
        self._stack = ExitStack()
        self._memory = self._stack.enter_context(PeakMemory(model))
        self._others, self._started = OtherWork(), time.perf_counter()

    def stop(self, step: int) -> StageCost:
        """End the part at a step of the run, and return its cost."""
        seconds, others = time.perf_counter() - self._started, self._others.disturbing()
        self._stack.close()
        rows_per_step = self._work.pace.rows / self._work.pace.steps_per_epoch
        speed = rows_per_step * (step - self._begun) / seconds
        begun = self._begun if self._resumed else 0
        if processes().num_processes > 1:  # the other programs are processes of this run
            others = None
        return StageCost(self._before + seconds, speed, self._memory.bytes, self._memory.method, begun, others)


class RunTrainer(Training, Trainer):
    """A trainer with the metrics, progress bar and log of a run. (It skips `Trainer`'s FLOPs, which nothing reads.)"""

    work: Workspace
    stage = "train"
    """Name of the stage, and of the folder of its checkpoints."""
    meter: Meter | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for unwanted in (PrinterCallback, ProgressCallback):
            self.remove_callback(unwanted)

    def settle(self) -> None:
        """Write checkpoints and TensorBoard files into the run folder, which exists and is locked by now."""
        self.args.output_dir = str(self.work.run.checkpoints(self.stage))
        for callback in self.callback_handler.callbacks:
            if type(callback).__name__ == "TensorBoardCallback":
                callback.logging_dir = str(
                    self.work.run.path / "tensorboard"
                )  # outside of the checkpoints, which are deleted at the end
        self.add_callback(SealCheckpoint())  # last, so that it seals the files of all other callbacks as well

    def _keep_prefix(self) -> None:
        """Store the outputs of frozen blocks in the run folder; they are deleted with the checkpoints, at the end."""
        self._prefix.cache, self._prefix.folder = self.work.prefix_cache, self.work.run.checkpoints("prefix")
        self._prefix.announce = lambda line: self.work.run.announce(self.stage, line)

    def _show(self, stage: str) -> None:
        """Set the stage that progress bar and log show."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, (LogLines, ProgressBar)):
                callback.begin(stage, self.state.global_step)

    # -- methods of `Trainer`, beside those that `Training` extends ------------------------------------------------

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **options: Any) -> dict[str, float]:
        """Compute the run's metrics from whole answers (`Trainer` sees batches alone) or, to stop early, the held-out
        loss."""
        found = self._compute_metrics(metric_key_prefix)
        self.log(found)
        told = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        self.control: TrainerControl = told
        return found

    def _compute_metrics(self, prefix: str) -> dict[str, float]:
        work = self.work
        if work.stops_early:  # test rows must not decide where training stops
            return {f"{prefix}_loss": held_out_loss(work, self.model, half_precision(self.args))}
        answers = {"": work.task.answer(work.respondent(self.model), work.test_rows)}
        return {f"{prefix}_{name}": value for name, value in scores_of(answers, work.task).metrics.items()}

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        """Turn the `RuntimeError` that `torch.save` raises on a full disk into one line."""
        try:
            with reporting_lost_processes():
                super()._save_checkpoint(*args, **options)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = one_line(error, 200)
            line = f"cannot write a checkpoint below {self.args.output_dir}; free disk space ({reason})"
            raise LightPeftError(line) from error

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: `Trainer` would go through all parameters at every step, for a number that nothing reads."""
        return 0


class LightRun(light_trainer(RunTrainer)):  # type: ignore[misc]
    """Light-PEFT in a run folder: estimation, plan and cut write their results there during training."""

    light_longer = "training.epochs"

    def __init__(
        self,
        work: Workspace,
        model: PeftModel,
        *,
        stop_at_cut: bool = False,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """
        Args:
            model: the dense base with PEFT modules or, to continue after the cut, the light model.
            stop_at_cut: end training after estimation, before the cut.
            callbacks: callbacks to call before those of the run.
        """
        self.work, self.stop_at_cut = work, stop_at_cut
        training = work.config.training
        options = {
            "light": work.config.light,
            "fast_steps": training.fast_steps,
            "teacher_weight": training.teacher_weight,
        }
        super().__init__(
            model, **_trainer_kwargs(work, [*callbacks, _StopAtStep(self, work.steps - work.last_steps)]), **options
        )
        _require_rows_apart(work, model)
        self._keep_prefix()
        self._schedule.last_steps = work.last_steps

    def checkpoint_at_cut(self, estimation_steps: int) -> Path:
        """Make a checkpoint from which training continues right after the cut."""
        return self._checkpoints.write_at_cut(estimation_steps, self.work.steps)

    def _begin_estimation(self, state: TrainerState, control: TrainerControl) -> None:
        self._show("estimate")
        self.meter = Meter(self.work, self._peft_model, state.global_step, resumed=state.global_step > 0)
        super()._begin_estimation(state, control)

    def _warn(self, line: str) -> None:
        """Do nothing: the stages print their own warnings."""

    def _warn_about_full_width(self) -> None:
        """Do nothing: the run trains at full width itself."""

    def make_light_plan(self, record: EstimationRecord) -> PrunePlan | None:
        """Write the scores into the run folder, and make the plan there; None: stop before the cut."""
        assert self.meter is not None
        write_estimation(self.work, self._peft_model, record, self.meter.stop(self.state.global_step))
        if self.stop_at_cut:
            return None
        if self.light_config.is_auto:
            self.write_light_budget(record)
        return write_plan(self.work.run)

    def write_light_budget(self, record: EstimationRecord) -> None:
        """Search for the budget of `light: auto` on the estimated model, and write it into the run folder."""
        self.light_budget = self.find_light_budget(record, self.work.steps)
        write_budget(self.work.run, self.light_budget)
        self.announce_light_budget(self.light_budget.summary())

    def announce_light_budget(self, line: str) -> None:
        """Print the line about the budget on stderr, and write it into the log."""
        self.work.run.announce("budget", line)

    def light_tolerance(self) -> Tolerance:
        """Return the tolerance of the run: by default in points where answers are classes, else in nats."""
        return self.work.tolerance

    def light_points_per_nat(self, classes: Tensor, right: Tensor) -> float:
        """Return the points of the task's metric that one nat of loss is worth, from predicted and right classes."""
        return points_per_nat(Answers(classes.tolist(), right.tolist()), self.work.task)

    def prune_light_model(self, plan: PrunePlan) -> LightModel:
        """Cut the model, and write the light adapter before fine-tuning into the run folder."""
        return write_pruned(self.work, self._peft_model, plan)

    def _begin_fine_tuning(self, max_steps: int) -> None:
        self._show("train")
        started, step = time.perf_counter(), self.state.global_step
        super()._begin_fine_tuning(max_steps)
        caching = time.perf_counter() - started
        self.meter = Meter(self.work, self._peft_model, step, step > self._estimation_steps, caching)


class DenseRun(RunTrainer):
    """Train plain PEFT or every weight in a run folder, with ordinary steps; frozen blocks run without a graph."""

    def __init__(
        self,
        work: Workspace,
        model: nn.Module,
        callbacks: Sequence[TrainerCallback] = (),
        steps: int | None = None,
        rate: float | None = None,
    ) -> None:
        """
        Args:
            callbacks: callbacks to call before those of the run.
            steps: optimizer steps; None: those of the run.
            rate: peak learning rate; None: that of the run.
        """
        self.work = work
        super().__init__(model, **_trainer_kwargs(work, callbacks, steps, rate))
        _require_rows_apart(work, model)
        self._teaching.weight = work.config.training.teacher_weight
        self._keep_prefix()
        if self.args.fp16:
            upcast_trained_weights(model)
        self.add_callback(_BeginDenseRun(self))

    def begin(self, state: TrainerState) -> None:
        """Show the stage, store a frozen prefix and start the meter, when training begins or continues."""
        self._show(self.stage)
        started = time.perf_counter()
        self._prefix.open(state.max_steps)
        caching = time.perf_counter() - started
        self.meter = Meter(self.work, self.model, state.global_step, state.global_step > 0, caching)


LABEL_SMOOTHING = 0.1
"""Default label smoothing of classification if all weights train after the cut: the model is overconfident without it
(docs/explanation/results.md#beside-smaller-models-and-full-fine-tuning)."""
FULL_WIDTH_RATE = 0.3
"""Learning rate of the last steps of a run that keeps its base whole, as a multiple of the run's
(docs/explanation/decoders.md)."""


class WideRun(DenseRun):
    """The last steps of a light run, over the whole base, with the faster steps of the run."""

    stage = "widen"

    def __init__(self, work: Workspace, model: nn.Module, callbacks: Sequence[TrainerCallback] = ()) -> None:
        super().__init__(work, model, callbacks, work.last_steps, work.rate * FULL_WIDTH_RATE)

    @contextmanager
    def _training(self, checkpoint: str | None) -> Iterator[None]:
        """Train with the faster steps, if the run has them on."""
        config = self.work.config
        steps = light_steps(self.model, config.light, fast=config.training.fast_steps, loss_only=True)
        with steps, super()._training(checkpoint):
            yield


class _StopAtStep(TrainerCallback):
    """Stops training of the light model where the steps at full width begin."""

    def __init__(self, trainer: LightRun, step: int) -> None:
        self.trainer, self.step = trainer, step

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.trainer.light_plan is not None and state.global_step >= self.step:
            control.should_training_stop = True


class _BeginDenseRun(TrainerCallback):
    """Calls `DenseRun.begin` when training begins, and writes the rows per step into each checkpoint."""

    def __init__(self, trainer: DenseRun) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.trainer.begin(state)

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_step(Path(args.output_dir) / f"checkpoint-{state.global_step}", args)


def _require_rows_apart(work: Workspace, model: nn.Module) -> None:
    """Refuse to train without padding if the model, on its device by now, would mix rows of a batch."""
    config = work.config
    if config.training.padding_free and not sharding_launched():  # a sharded model cannot compute yet
        reads_others = f"training.padding_free: rows of {config.model.name} would attend to each other"
        apart = keeps_rows_apart(model, autocast_dtype(config.training))
        require(apart, f"{reads_others} without padding; set it to false")


def _trainer_kwargs(
    work: Workspace, callbacks: Sequence[TrainerCallback], steps: int | None = None, rate: float | None = None
) -> dict[str, Any]:
    """Make the keyword arguments of all trainers of a run.

    Args:
        callbacks: callbacks to call before those of the run.
        steps: optimizer steps; None: those of the run.
        rate: peak learning rate; None: that of the run.
    """
    steps, rate = work.steps if steps is None else steps, work.rate if rate is None else rate
    config = work.config
    training = replace(work.config.training, learning_rate=rate)
    given = dict(config.trainer)
    if config.method_spec.prunes and config.light.train == "all" and work.task.labels:
        given.setdefault("label_smoothing_factor", LABEL_SMOOTHING)
    # a trainer creates its folder at once, but a run writes nothing before all checks pass: see `RunTrainer.settle`
    stops = steps == work.steps
    if stops and work.stops_early:
        training = replace(training, save_steps=work.pace.steps_per_epoch)
        given |= stopping_arguments(work)
    arguments = training_arguments(training, Path(tempfile.gettempdir()), steps, config.seed, given)
    return {
        "args": arguments,
        "train_dataset": work.taught_rows(),
        "eval_dataset": work.test_rows,
        "data_collator": work.training_collator,
        "callbacks": [
            *callbacks,
            *(stopping_callbacks(work) if stops else ()),
            ProgressBar(steps),
            LogLines(work.run.log),
        ],
    }
