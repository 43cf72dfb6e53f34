"""`transformers.Trainer` as a run uses it: batches that depend on seed and epoch alone, one-line errors, signals."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer

from lightpeft.compat.torch import Noted
from lightpeft.compat.transformers import LengthGroupedSampler
from lightpeft.errors import LightPeftError, one_line
from lightpeft.training.callbacks import ProgressBar, StopOnSignal
from lightpeft.training.step_rows import rows_a_step


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; what was done so far is on disk and the same command goes on from it."""


class Repeatable:
    """Mixin of trainers: a resumed run sees the batches that it would have seen, on any number of processes."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """Batches by length depend on seed and epoch alone, and are the same rows on any number of processes."""
        sampler = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        if isinstance(sampler, LengthGroupedSampler):
            trainer: Any = self
            sampler.batch_size *= trainer.args.world_size
            sampler.lengths = list(sampler.lengths)  # a data set's column makes a new data set for every item read
            return _EpochOrder(sampler, trainer.args.seed, lambda: int(trainer.state.epoch or 0))
        return sampler

    def rows_of_steps(self, steps: int) -> set[int] | None:
        """Numbers of the training rows that the first steps of a run go through; None where these are not known."""
        trainer: Any = self
        order = self._get_train_sampler(trainer.train_dataset)
        if not isinstance(order, _EpochOrder):
            return None
        return set(itertools.islice(order.of_epoch(0), steps * rows_a_step(trainer.args)))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """The trainer's own; in training, a loss that is a mean over a batch counts as one of those of its step.

        transformers takes every forward with **kwargs, and every `compute_loss_func`, for one that divides by
        `num_items_in_batch`, and adds up what they give. Many do not: most models' losses for classes, numbers, several
        labels and tags, and functions that return a mean. Their gradients would grow with accumulation steps and
        processes. A loss that has not read the number is such a mean.
        """
        trainer: Any = self
        told = getattr(trainer, "loss_is_scaled_for_ga", None) is not None  # transformers asks from 5.19 on
        count = options.get("num_items_in_batch")
        if args or options.get("return_outputs") or count is None or told:  # evaluation, or nothing to find out
            return super().compute_loss(model, inputs, *args, **options)  # type: ignore[misc]
        items = Noted.of(count)
        loss = super().compute_loss(model, inputs, **{**options, "num_items_in_batch": items})  # type: ignore[misc]
        if items.read:
            return loss
        if self.has_plain_loss() and trainer.args.average_tokens_across_devices:  # it was multiplied by these
            loss = loss / (trainer.accelerator.num_processes // trainer.get_tp_size())
        return loss / trainer.current_gradient_accumulation_steps

    def has_plain_loss(self) -> bool:
        """Whether the loss is computed by `Trainer`'s own method."""
        return super().compute_loss.__func__ is Trainer.compute_loss  # type: ignore[misc]


class _EpochOrder(Sampler):
    """The order of a `LengthGroupedSampler`, drawn from a seed of its own in each epoch."""

    def __init__(self, sampler: LengthGroupedSampler, seed: int, epoch: Callable[[], int]) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        return self.of_epoch(self.epoch())

    def of_epoch(self, epoch: int) -> Iterator[int]:
        """Row numbers in the order of an epoch."""
        self.sampler.generator = torch.Generator().manual_seed(self.seed + epoch)
        return iter(self.sampler)


class RunTrainer(Repeatable, Trainer):
    """The trainer of a run, with the run's own bar and log."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for unwanted in (PrinterCallback, ProgressCallback):
            self.remove_callback(unwanted)

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        try:
            with meeting_others():
                super()._save_checkpoint(*args, **options)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what `torch.save` raises on a full disk, in many words
            reason = one_line(error, 200)
            line = f"cannot write below {self.args.output_dir}; is the disk full? ({reason})"
            raise LightPeftError(line) from error

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the trainer would go through all parameters at every step, for a number that nobody reads."""
        return 0


def train_in_float32(model: nn.Module) -> None:
    """Weights that train become float32: PEFT makes its own so, but no head, and a gradient scaler takes no others."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def fit(trainer: Trainer, resume_from: Path | None) -> None:
    """Train.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived; a checkpoint was written at the end of the step under way.
        LightPeftError: the device ran out of memory, or the disk is full.
    """
    stop = StopOnSignal()
    trainer.add_callback(stop)
    with stop.listening(), _readable_errors(trainer.args.output_dir), meeting_others():
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


@contextmanager
def meeting_others() -> Iterator[None]:
    """Turn the loss of another process, which this one finds where it waits for it, into one line.

    Raises:
        LightPeftError: another process of the training is gone.
    """
    try:
        yield
    except RuntimeError as error:
        told = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if not told or not torch.distributed.is_initialized():
            raise
        if hasattr(signal, "pthread_sigmask"):  # launchers end the others by SIGTERM: first the line is to be told
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        raise LightPeftError(
            "another process of this training has ended, and what is left cannot go on without it; "
            "start all again: training goes on from the last checkpoint"
        ) from error


@contextmanager
def _readable_errors(checkpoints: str) -> Iterator[None]:
    """Turn running out of memory or disk into one line."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise LightPeftError("out of memory; lower training.batch_size and raise gradient_accumulation") from error
    except (OSError, SafetensorError) as error:
        raise LightPeftError(f"cannot write below {checkpoints}: {one_line(error)}") from error
