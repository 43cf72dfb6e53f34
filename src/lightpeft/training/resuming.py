"""Going on from a trainer's checkpoint whose files are not what their libraries expect: one line, and no guess."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from lightpeft.compat.transformers import SCALER_NAME, TRAINER_STATE_NAME, check_resuming
from lightpeft.config.validation import shown
from lightpeft.errors import require
from lightpeft.files.foreign import parsing
from lightpeft.models.sharding import is_sharded
from lightpeft.training.checkpoints import newest_checkpoint
from lightpeft.training.fitting import meeting_others
from lightpeft.training.host import Host
from lightpeft.training.sharding import Sharding
from lightpeft.training.step_rows import check_step

_INSTEAD = "go on from an older one: remove this checkpoint, or name another"


class Checkpoints:
    """A trainer's checkpoints: those of one process, whatever trains; what cannot be read of them is one line."""

    def __init__(self, trainer: Host, sharding: Sharding) -> None:
        self._trainer, self._sharding = trainer, sharding

    def to_resume(self, asked: str | bool | None) -> str | None:
        """The checkpoint to go on from; nothing of it is believed before its state has been looked at.

        Args:
            asked: its folder; True: the newest one.

        Raises:
            LightPeftError: it is damaged, or of steps of another size.
        """
        folder = Path(self._trainer.args.output_dir)
        checkpoint = newest_checkpoint(folder) if asked is True else asked or None
        if checkpoint is not None:
            check_resuming()
            check_state(Path(checkpoint))
            check_step(Path(checkpoint), self._trainer.args)
        return checkpoint

    def load_weights(self, folder: str, usual: Callable[[], None]) -> None:
        """Load weights as the trainer does, where `Sharding.before` has not."""
        if not is_sharded(self._trainer.model):
            with _readable(folder, "weights"), self._sharding.as_one_process():
                usual()

    def load_states(self, checkpoint: str | None, usual: Callable[[str | None], None]) -> None:
        """Load optimizer and scheduler as the trainer does."""
        with _readable(checkpoint, "state of optimizer and scheduler"), self._sharding.as_one_process():
            usual(checkpoint)

    def load_random_state(self, checkpoint: str | None, usual: Callable[[str | None], None]) -> None:
        """Load random numbers as the trainer does."""
        with _readable(checkpoint, "random numbers"):
            usual(checkpoint)

    def load_best(self, usual: Callable[[], None]) -> None:
        """Load the best model as the trainer does."""
        with self._sharding.as_one_process():
            usual()


@contextmanager
def _readable(checkpoint: str | None, what: str) -> Iterator[None]:
    with parsing(f"{checkpoint} is damaged: its {what} cannot be read", _INSTEAD), meeting_others():
        yield


def check_state(checkpoint: Path) -> None:
    """Check the state of a trainer in a checkpoint: numbers where it has numbers, lists and tables where it has these.

    Raises:
        LightPeftError: it is not there, or is none.
    """
    file, usual = checkpoint / TRAINER_STATE_NAME, TrainerState()
    with parsing(f"{file} is damaged", _INSTEAD):
        state = TrainerState.load_from_json(str(file))
    for name in (field.name for field in fields(TrainerState)):
        expected, value = getattr(usual, name), getattr(state, name)
        if isinstance(expected, (int, float)):
            fits = isinstance(value, (int, float)) and 0 <= value < math.inf
        elif expected is None:
            fits = value is None or isinstance(value, _OPTIONAL.get(name, object))
        else:
            fits = isinstance(value, type(expected))
        require(fits, f"{file} is damaged: {name} is {shown(value)}; {_INSTEAD}")
    step, steps = state.global_step, state.max_steps
    reached = type(step) is int and step <= steps
    require(reached, f"{file} is damaged: it is of step {shown(step)}, of {shown(steps)}; {_INSTEAD}")
    tables = all(isinstance(entry, dict) for entry in state.log_history)
    require(tables, f"{file} is damaged: an entry of log_history is no table; {_INSTEAD}")
    callbacks = [each if isinstance(each, list) else [each] for each in state.stateful_callbacks.values()]
    tables = all(isinstance(entry, dict) for each in callbacks for entry in each)
    require(tables, f"{file} is damaged: the state of a callback is no table; {_INSTEAD}")
    scaler = checkpoint / SCALER_NAME
    if scaler.is_file():
        with parsing(f"{checkpoint} is damaged: its state of the gradient scaler cannot be read", _INSTEAD):
            torch.amp.GradScaler("cpu").load_state_dict(torch.load(scaler, weights_only=True))


_OPTIONAL: dict[str, Any] = {
    "train_batch_size": int,
    "best_metric": (int, float),
    "best_global_step": int,
    "best_model_checkpoint": str,
}
"""What a state may lack, and what it is where it is there."""
