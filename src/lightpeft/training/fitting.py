"""One training from start to end: signals, lost processes and a full disk each end it with one line."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer

from lightpeft.errors import LightPeftError, one_line
from lightpeft.training.callbacks import ProgressBar, StopOnSignal


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run; a checkpoint is on disk, and the same command resumes from it."""


def upcast_trained_weights(model: nn.Module) -> None:
    """Convert trained weights to float32, which a gradient scaler needs; PEFT converts its own, but not a head."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def run_training(trainer: Trainer, resume_from: Path | None) -> None:
    """Train until the end, or until a signal.

    Args:
        resume_from: checkpoint to resume from; None: start anew.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived; a checkpoint was written after the current step.
        LightPeftError: the device ran out of memory, the disk is full, or another process has ended.
    """
    stop = StopOnSignal()
    trainer.add_callback(stop)
    with stop.listening(), _readable_errors(trainer.args.output_dir), reporting_lost_processes():
        bars = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ProgressBar)]
        try:
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
            for bar in bars if not stop.requested else ():
                bar.end_at(trainer.state.global_step)
        finally:
            for bar in bars:
                bar.progress.stop()
    if stop.requested:
        raise Interrupted(f"stopped at step {trainer.state.global_step}; run the same command again to resume")


@contextmanager
def reporting_lost_processes() -> Iterator[None]:
    """Turn the error of a collective operation into one line if another process of the training has ended.

    Raises:
        LightPeftError: another process has ended.
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
            "another process of this training has ended, and the others cannot continue without it; "
            "start all processes again to resume from the last checkpoint"
        ) from error


@contextmanager
def _readable_errors(checkpoints: str) -> Iterator[None]:
    """Turn errors from full memory or a full disk into one line."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise LightPeftError(
            "out of memory: lower training.batch_size, and raise training.gradient_accumulation"
        ) from error
    except (OSError, SafetensorError) as error:
        raise LightPeftError(f"cannot write to {checkpoints}: {one_line(error)}") from error
