"""Fine-tuning through `transformers.Trainer`: arguments, progress, log lines, checkpoints, and stopping on signals."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch.utils.data import Sampler
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from lightpeft.config import TrainingConfig
from lightpeft.errors import LightPeftError
from lightpeft.files import CHECKSUMS, append_line, check_sealed, seal
from lightpeft.machine import accelerator, autocast_dtype, processes


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; what was done so far is on disk and the same command goes on from it."""


def make_trainer(
    model: PeftModel | PreTrainedModel,
    rows: Dataset,
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
    config: TrainingConfig,
    *,
    stage: str,
    checkpoints: Path,
    log: Path,
    steps: int,
    seed: int,
    token_loss: bool,
    shown_steps: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """A `Trainer` for one stage of a run; under float16 autocast, what trains of the model is made float32.

    Args:
        rows: encoded rows with a `length` column.
        steps: optimizer steps of the learning-rate schedule: warmup, then linear decay to zero.
        checkpoints: folder for the stage's checkpoints, two at most.
        log: the run's log.jsonl, to which loss, learning rate and gradient norm are appended.
        token_loss: the model's loss is a mean over the labelled tokens of the whole optimizer step (causal LM); else
            each batch has its own mean, and accumulation averages those.
        shown_steps: what the progress bar counts to, where the stage ends before its schedule does.
        callbacks: called before the ones made here.
    """
    autocast = autocast_dtype(config)
    if autocast is torch.float16:
        _train_in_float32(model)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=float(config.learning_rate),
        lr_scheduler_type="linear",
        warmup_steps=int(config.warmup * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=autocast is torch.bfloat16,
        fp16=autocast is torch.float16,
        use_cpu=accelerator() is None,
        gradient_checkpointing=config.gradient_checkpointing,
        train_sampling_strategy="group_by_length" if config.by_length else "random",
        length_column_name="length",
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        log_level="error",
        log_level_replica="error",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        report_to=[],
        seed=seed,
        data_seed=seed,
    )
    trainer = _StageTrainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=collator,
        callbacks=[*callbacks, ProgressBar(stage, shown_steps or steps), LogLines(log, stage), SealCheckpoint()],
    )
    # transformers takes any forward with **kwargs for one whose loss is normalised by `num_items_in_batch`; those for
    # classification ignore it, and their gradients would grow with accumulation steps and processes
    trainer.model_accepts_loss_kwargs = token_loss
    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    return trainer


def _train_in_float32(model: torch.nn.Module) -> None:
    """Weights that train become float32: PEFT makes its own so, but no head, and a gradient scaler takes no others."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


class _StageTrainer(Trainer):
    """A `Trainer` whose batches by length depend on seed and epoch alone, so that a resumed run sees the same ones.

    Its steps see the same rows on any number of processes.
    """

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size *= self.args.world_size
            sampler.lengths = list(sampler.lengths)  # a data set's column makes a new data set for every item read
            return _EpochOrder(sampler, lambda: self.args.seed + int(self.state.epoch or 0))
        return sampler

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        try:
            super()._save_checkpoint(*args, **options)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what `torch.save` raises on a full disk, in many words
            reason = " ".join(str(error).split())[:200]
            line = f"cannot write below {self.args.output_dir}; is the disk full? ({reason})"
            raise LightPeftError(line) from error

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the trainer would go through all parameters at every step, for a number that nobody reads."""
        return 0


class _EpochOrder(Sampler):
    """The order of a `LengthGroupedSampler`, drawn from a seed of its own in each epoch."""

    def __init__(self, sampler: LengthGroupedSampler, seed: Callable[[], int]) -> None:
        self.sampler, self.seed = sampler, seed

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed())
        return iter(self.sampler)


def fit(trainer: Trainer, resume_from: Path | None) -> float:
    """Train; returns the seconds spent.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived; a checkpoint was written at the end of the step under way.
        LightPeftError: the device ran out of memory, or the disk is full.
    """
    stop = StopOnSignal()
    trainer.add_callback(stop)
    started = time.perf_counter()
    with stop.listening(), _readable_errors(trainer.args.output_dir):
        bars = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ProgressBar)]
        try:
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
            for bar in bars if not stop.requested else ():
                bar.end_at(trainer.state.global_step)
        finally:
            for bar in bars:
                bar.progress.stop()
    if stop.requested:
        raise Interrupted(f"stopped at step {trainer.state.global_step}; the same command goes on from there")
    return time.perf_counter() - started


@contextmanager
def _readable_errors(checkpoints: str) -> Iterator[None]:
    """Turn running out of memory or disk into one line."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise LightPeftError("out of memory; lower training.batch_size and raise gradient_accumulation") from error
    except (OSError, SafetensorError) as error:
        raise LightPeftError(f"cannot write below {checkpoints}: {' '.join(str(error).split())}") from error


def last_checkpoint(folder: Path, announce: Callable[[str], None] = lambda line: None) -> Path | None:
    """The newest checkpoint that is as it was written; None without any.

    Args:
        announce: told of a damaged one, which is removed.
    """
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{CHECKSUMS}") if path.parent.name[11:].isdigit()]
    for checkpoint in sorted(complete, key=step_of, reverse=True):
        try:
            check_sealed(checkpoint)
        except LightPeftError as error:
            announce(f"{error}; going on from an older checkpoint, or from the beginning of the stage")
            shutil.rmtree(checkpoint, ignore_errors=True)
        else:
            return checkpoint
    return None


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])


class SealCheckpoint(TrainerCallback):
    """Seals a checkpoint when everything in it is written: a run that was killed while saving skips it."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        processes().wait_for_everyone()  # each writes its random state
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class LogLines(TrainerCallback):
    """Appends what the trainer logs to the run's log.jsonl."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            append_line(self.path, {"stage": self.stage, "step": state.global_step, **logs})


class ProgressBar(TrainerCallback):
    """A rich progress bar with loss, step count, elapsed and remaining time."""

    def __init__(self, stage: str, total: int) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task(stage, total=total, loss="")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.progress.update(self.task, loss=f"loss {float(logs['loss']):.4f}")

    def end_at(self, step: int) -> None:
        """The stage is over, perhaps after fewer steps than it might have taken."""
        self.progress.update(self.task, total=step, completed=step)


class StopOnSignal(TrainerCallback):
    """SIGINT and SIGTERM end training after the step under way, with a checkpoint; a second signal ends it at once.

    A stage that is over gets no checkpoint: what it leaves is its result, and nothing is to be trained from there.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block (in the main thread; elsewhere they cannot be handled)."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True

        try:
            before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_training_stop:
            control.should_save = False
        elif self.requested:
            control.should_save = True
            control.should_training_stop = True
