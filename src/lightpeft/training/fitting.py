"""A training from its beginning to its end: signals, other processes and a full disk, each told in one line."""

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
    """A signal asked the run to stop; what was done so far is on disk and the same command goes on from it."""


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
