"""The trainers of a run: those that anybody can use, with the run's folder, log and measures around them."""

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
from lightpeft.app.runs.stages import StageCost, leave_budget, leave_estimation, leave_plan, leave_pruned
from lightpeft.app.runs.stopping import loss_aside, stopping_arguments, stopping_callbacks
from lightpeft.app.runs.workspace import Workspace
from lightpeft.app.tasks.answers import Answers
from lightpeft.app.tasks.worth import points_a_nat
from lightpeft.config import Tolerance
from lightpeft.errors import LightPeftError, one_line
from lightpeft.plans.records import EstimationRecord, PrunePlan
from lightpeft.profiling.memory import PeakMemory
from lightpeft.prune.light_model import LightModel
from lightpeft.recipe.trainer import light_trainer
from lightpeft.training.acceleration import light_steps
from lightpeft.training.arguments import half_precision, training_arguments
from lightpeft.training.callbacks import LogLines, ProgressBar, SealCheckpoint
from lightpeft.training.fitting import meeting_others, train_in_float32
from lightpeft.training.step_rows import write_step
from lightpeft.training.trainer import Training


class Meter:
    """Measures a part of training."""

    def __init__(self, work: Workspace, model: nn.Module, step: int, resumed: bool, before: float = 0.0) -> None:
        """
        Args:
            step: of the run, at which the part begins.
            resumed: whether an earlier process has begun the part.
            before: seconds that went by before, and count.
        """
        self._work, self._begun, self._resumed, self._before = work, step, resumed, before
        self._stack = ExitStack()
        self._memory = self._stack.enter_context(PeakMemory(model))
        self._started = time.perf_counter()

    def stop(self, step: int) -> StageCost:
        """What the part took, which ends at a step of the run."""
        seconds = time.perf_counter() - self._started
        self._stack.close()
        rows_a_step = self._work.pace.rows / self._work.pace.steps_an_epoch
        speed = rows_a_step * (step - self._begun) / seconds
        begun = self._begun if self._resumed else 0
        return StageCost(self._before + seconds, speed, self._memory.bytes, self._memory.method, begun)


class RunTrainer(Training, Trainer):
    """A trainer of a run: its metrics, and its bar and log. (It computes no FLOPs, which nobody reads.)"""

    work: Workspace
    stage = "train"
    """Under which name checkpoints are kept."""
    meter: Meter | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for unwanted in (PrinterCallback, ProgressCallback):
            self.remove_callback(unwanted)

    def settle(self) -> None:
        """Take the run folder, which is there and held, as the place for checkpoints and what trackers write."""
        self.args.output_dir = str(self.work.run.checkpoints(self.stage))
        for callback in self.callback_handler.callbacks:
            if type(callback).__name__ == "TensorBoardCallback":
                callback.logging_dir = str(self.work.run.path / "tensorboard")  # checkpoints go, and this stays
        self.add_callback(SealCheckpoint())  # last: all that others write is in the checkpoint then

    def _keep_prefix(self) -> None:
        """Let states of a frozen prefix lie in the run folder; they go with the checkpoints, at the end."""
        self._prefix.cache, self._prefix.folder = self.work.prefix_cache, self.work.run.checkpoints("prefix")
        self._prefix.announce = lambda line: self.work.run.announce(self.stage, line)

    def _show(self, stage: str) -> None:
        """Let bar and log say which stage it is."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, (LogLines, ProgressBar)):
                callback.begin(stage, self.state.global_step)

    # -- methods of `Trainer`, beside those that `Training` extends ------------------------------------------------

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **options: Any) -> dict[str, float]:
        """`Trainer` sees batches, and the run's metrics are of whole answers; or the loss says where training stops."""
        found = self._measured(metric_key_prefix)
        self.log(found)
        told = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        self.control: TrainerControl = told
        return found

    def _measured(self, prefix: str) -> dict[str, float]:
        work = self.work
        if work.stops_early:  # the loss of rows set aside says where to stop; test rows say nothing until the end
            return {f"{prefix}_loss": loss_aside(work, self.model, half_precision(self.args))}
        answers = {"": work.task.answer(work.asking(self.model), work.test_rows)}
        return {f"{prefix}_{name}": value for name, value in scores_of(answers, work.task).metrics.items()}

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        """What `torch.save` raises on a full disk, in many words, is a `RuntimeError` like any other elsewhere."""
        try:
            with meeting_others():
                super()._save_checkpoint(*args, **options)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = one_line(error, 200)
            line = f"cannot write below {self.args.output_dir}; is the disk full? ({reason})"
            raise LightPeftError(line) from error

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """`Trainer` goes through all parameters at every step, for a number that nobody reads."""
        return 0


class LightRun(light_trainer(RunTrainer)):  # type: ignore[misc]
    """Light-PEFT in a run folder: what estimation and the cut find goes there on the way."""

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
            model: with PEFT modules on the dense base or, to go on behind the cut, the light model.
            stop_at_cut: end when estimation is over, with a dense model.
            callbacks: called before those of the run.
        """
        self.work, self.stop_at_cut = work, stop_at_cut
        training = work.config.training
        options = {
            "light": work.config.light,
            "fast_steps": training.fast_steps,
            "teacher_weight": training.teacher_weight,
        }
        super().__init__(model, **_options(work, [*callbacks, _EndsAt(self, work.steps - work.last_steps)]), **options)
        self._keep_prefix()
        self._schedule.last_steps = work.last_steps

    def checkpoint_at_cut(self, estimation_steps: int) -> Path:
        """A checkpoint from which training goes on behind the cut, as if nothing had happened since."""
        return self._checkpoints.at_cut(estimation_steps, self.work.steps)

    def _begin_estimation(self, state: TrainerState, control: TrainerControl) -> None:
        self._show("estimate")
        self.meter = Meter(self.work, self._peft_model, state.global_step, resumed=state.global_step > 0)
        super()._begin_estimation(state, control)

    def _warn(self, line: str) -> None:
        """The stages say it, each in its place."""

    def _note_full_width(self) -> None:
        """The run does it itself."""

    def make_light_plan(self, record: EstimationRecord) -> PrunePlan | None:
        """Leave the record in the run folder, and take the plan that the folder then has."""
        assert self.meter is not None
        leave_estimation(self.work, self._peft_model, record, self.meter.stop(self.state.global_step))
        if self.stop_at_cut:
            return None
        if self.light_config.is_auto:
            self.leave_light_budget(record)
        return leave_plan(self.work.run)

    def leave_light_budget(self, record: EstimationRecord) -> None:
        """Find a budget for the model as estimation left it, and leave it in the run folder."""
        self.light_budget = self.find_light_budget(record, self.work.steps)
        leave_budget(self.work.run, self.light_budget)
        self.announce_light_budget(self.light_budget.summary())

    def announce_light_budget(self, line: str) -> None:
        """On stderr and in the log."""
        self.work.run.announce("budget", line)

    def light_tolerance(self) -> Tolerance:
        """Points where answers are classes, if nothing else is asked for."""
        return self.work.tolerance

    def light_points_a_nat(self, classes: Tensor, right: Tensor) -> float:
        """By what the task's metric makes of these answers."""
        return points_a_nat(Answers(classes.tolist(), right.tolist()), self.work.task)

    def prune_light_model(self, plan: PrunePlan) -> LightModel:
        """Cut, and leave the light adapter before fine-tuning in the run folder."""
        return leave_pruned(self.work, self._peft_model, plan)

    def _begin_fine_tuning(self, max_steps: int) -> None:
        self._show("train")
        started, step = time.perf_counter(), self.state.global_step
        super()._begin_fine_tuning(max_steps)
        caching = time.perf_counter() - started
        self.meter = Meter(self.work, self._peft_model, step, step > self._estimation_steps, caching)


class DenseRun(RunTrainer):
    """Plain PEFT, or every weight, in a run folder, as both train by habit; frozen blocks run without a graph."""

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
            callbacks: called before those of the run.
            steps, rate: optimizer steps, and peak learning rate; None: those of the run.
        """
        self.work = work
        super().__init__(model, **_options(work, callbacks, steps, rate))
        self._teaching.weight = work.config.training.teacher_weight
        self._keep_prefix()
        if self.args.fp16:
            train_in_float32(model)
        self.add_callback(_Course(self))

    def begin(self, state: TrainerState) -> None:
        """Training begins, or goes on from a checkpoint."""
        self._show(self.stage)
        started = time.perf_counter()
        self._prefix.open(state.max_steps)
        caching = time.perf_counter() - started
        self.meter = Meter(self.work, self.model, state.global_step, state.global_step > 0, caching)


LABEL_SMOOTHING = 0.1
"""Of classes, where all weights train behind the cut, unless `trainer` says another: they grow too sure of their
answers without it (docs/how-to/train_all.md)."""
FULL_WIDTH_RATE = 0.3
"""Learning rate of the last steps of a run that keeps its base whole, as a multiple of the run's
(docs/explanation/decoders.md)."""


class WideRun(DenseRun):
    """The last steps of a light run, over the whole base, as fast as the others."""

    stage = "widen"

    def __init__(self, work: Workspace, model: nn.Module, callbacks: Sequence[TrainerCallback] = ()) -> None:
        super().__init__(work, model, callbacks, work.last_steps, work.rate * FULL_WIDTH_RATE)

    @contextmanager
    def _training(self, checkpoint: str | None) -> Iterator[None]:
        """With the faster steps, if the run takes them."""
        config = self.work.config
        steps = light_steps(self.model, config.light, fast=config.training.fast_steps, loss_alone=True)
        with steps, super()._training(checkpoint):
            yield


class _EndsAt(TrainerCallback):
    """Ends the training of the light model where the steps at full width begin."""

    def __init__(self, trainer: LightRun, step: int) -> None:
        self.trainer, self.step = trainer, step

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.trainer.light_plan is not None and state.global_step >= self.step:
            control.should_training_stop = True


class _Course(TrainerCallback):
    """Calls a dense run where its trainer is at the right place."""

    def __init__(self, trainer: DenseRun) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.trainer.begin(state)

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_step(Path(args.output_dir) / f"checkpoint-{state.global_step}", args)


def _options(
    work: Workspace, callbacks: Sequence[TrainerCallback], steps: int | None = None, rate: float | None = None
) -> dict[str, Any]:
    """What all trainers of a run are made with; arguments as for `DenseRun`."""
    steps, rate = work.steps if steps is None else steps, work.rate if rate is None else rate
    config = work.config
    training = replace(work.config.training, learning_rate=rate)
    given = dict(config.trainer)
    if config.way.prunes and config.light.train == "all" and work.task.labels:
        given.setdefault("label_smoothing_factor", LABEL_SMOOTHING)
    # a trainer makes its folder at once, and a run nothing before all is found good: see `RunTrainer.settle`
    stops = steps == work.steps
    if stops and work.stops_early:
        training = replace(training, save_steps=work.pace.steps_an_epoch)
        given |= stopping_arguments(work)
    arguments = training_arguments(training, Path(tempfile.gettempdir()), steps, config.seed, given)
    return {
        "args": arguments,
        "train_dataset": work.taught_rows(),
        "eval_dataset": work.test_rows,
        "data_collator": work.collator,
        "callbacks": [
            *callbacks,
            *(stopping_callbacks(work) if stops else ()),
            ProgressBar(steps),
            LogLines(work.run.log),
        ],
    }
