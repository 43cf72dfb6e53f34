"""Going on from a trainer's checkpoint whose files are not what their libraries expect: one line, and no guess."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import TrainerState

from lightpeft.compat.transformers import SCALER_NAME, TRAINER_STATE_NAME, check_resuming, cpu_without_number
from lightpeft.config.validation import short_repr
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
        readable = _readable(checkpoint, "state of optimizer and scheduler")
        with readable, self._sharding.as_one_process(), cpu_without_number(self._trainer.args):
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
    """Check that the state of a trainer in a checkpoint can be read, and is of a step of its training.

    Raises:
        LightPeftError: it is not there, or is none.
    """
    file = checkpoint / TRAINER_STATE_NAME
    with parsing(f"{file} is damaged", _INSTEAD):
        state = TrainerState.load_from_json(str(file))
    step, steps = state.global_step, state.max_steps
    reached = type(step) is type(steps) is int and 0 <= step <= steps
    require(reached, f"{file} is damaged: it is of step {short_repr(step)}, of {short_repr(steps)}; {_INSTEAD}")
    scaler = checkpoint / SCALER_NAME
    if scaler.is_file():
        with parsing(f"{checkpoint} is damaged: its state of the gradient scaler cannot be read", _INSTEAD):
            torch.amp.GradScaler("cpu").load_state_dict(torch.load(scaler, weights_only=True))
