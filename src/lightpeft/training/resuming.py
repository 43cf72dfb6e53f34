"""Going on from a trainer's checkpoint whose files are not what their libraries expect: one line, and no guess."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainerState

from lightpeft.compat.transformers import TRAINER_STATE_NAME
from lightpeft.config.validation import shown
from lightpeft.errors import require
from lightpeft.files.foreign import parsing
from lightpeft.training.trainer import meeting_others

_INSTEAD = "go on from an older one: remove this checkpoint, or name another"


class ResumingMixin:
    """Mixin of trainers: what of a checkpoint cannot be read, by whichever library, is said in one line."""

    def train(self, resume_from_checkpoint: str | None = None, *args: Any, **options: Any) -> Any:
        """As the trainer's own; nothing of a checkpoint is believed before its state has been looked at."""
        if resume_from_checkpoint is not None:
            check_state(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **options)  # type: ignore[misc]

    def _load_from_checkpoint(self, folder: str, *args: Any, **options: Any) -> None:
        with _readable(folder, "weights"):
            super()._load_from_checkpoint(folder, *args, **options)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint, "state of optimizer and scheduler"):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint, "state of the gradient scaler"):
            super()._load_scaler(checkpoint)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _readable(checkpoint, "random numbers"):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]

    def _load_callback_state(self) -> None:
        with _readable("the checkpoint", "state of callbacks"):
            super()._load_callback_state()  # type: ignore[misc]


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


_OPTIONAL: dict[str, Any] = {
    "train_batch_size": int,
    "best_metric": (int, float),
    "best_global_step": int,
    "best_model_checkpoint": str,
}
"""What a state may lack, and what it is where it is there."""
