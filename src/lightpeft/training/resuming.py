"""Resume from a trainer's checkpoint; a damaged file ends in one line."""

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
from lightpeft.training.fitting import reporting_lost_processes
from lightpeft.training.host import Host
from lightpeft.training.sharding import Sharding
from lightpeft.training.step_rows import check_step

_USE_OLDER = "resume from an older one: remove this checkpoint, or name another"


class Checkpoints:
    """Loads a trainer's checkpoints, which are written as by one process; a damaged file ends in one line."""

    def __init__(self, trainer: Host, sharding: Sharding) -> None:
        self._trainer, self._sharding = trainer, sharding

    def to_resume(self, asked: str | bool | None) -> str | None:
        """Return the checkpoint to resume from, after checking its state; None: none.

        Args:
            asked: folder of the checkpoint; True: the newest one; None or False: none.

        Raises:
            LightPeftError: there is none, it is damaged, or it was trained with another global batch.
        """
        folder = Path(self._trainer.args.output_dir)
        checkpoint = newest_checkpoint(folder) if asked is True else asked or None
        require(checkpoint or not asked, f"{folder} has no checkpoint to resume from; train without resuming")
        if checkpoint is not None:
            check_resuming()
            require(Path(checkpoint).is_dir(), f"{checkpoint} is not a checkpoint: there is no such folder")
            check_state(Path(checkpoint))
            check_step(Path(checkpoint), self._trainer.args)
        return checkpoint

    def load_weights(self, folder: str, usual: Callable[[], None]) -> None:
        """Load weights by the trainer's own method, unless the model is sharded: those are loaded before sharding."""
        if not is_sharded(self._trainer.model):
            with _reporting_damage(folder, "weights"), self._sharding.as_one_process(), _reporting_other_sizes(folder):
                usual()

    def load_states(self, checkpoint: str | None, usual: Callable[[str | None], None]) -> None:
        """Load optimizer and scheduler by the trainer's own method."""
        readable = _reporting_damage(checkpoint, "state of optimizer and scheduler")
        with readable, self._sharding.as_one_process(), cpu_without_number(self._trainer.args):
            usual(checkpoint)

    def load_random_state(self, checkpoint: str | None, usual: Callable[[str | None], None]) -> None:
        """Load the random state by the trainer's own method."""
        with _reporting_damage(checkpoint, "random state"):
            usual(checkpoint)

    def load_best(self, usual: Callable[[], None]) -> None:
        """Load the best model by the trainer's own method."""
        with self._sharding.as_one_process():
            usual()


@contextmanager
def _reporting_damage(checkpoint: str | None, what: str) -> Iterator[None]:
    """Turn errors inside the block into one line: this part of the checkpoint is damaged."""
    with parsing(f"{checkpoint} is damaged: its {what} cannot be read", _USE_OLDER), reporting_lost_processes():
        yield


@contextmanager
def _reporting_other_sizes(checkpoint: str) -> Iterator[None]:
    """Turn PyTorch's list of tensors of other sizes into one line: the model is another one."""
    try:
        yield
    except RuntimeError as error:
        other = f"{checkpoint} has weights of other sizes than this trainer's model"
        require("size mismatch" not in str(error), f"{other}; use the same model and peft_config as before")
        raise


def check_state(checkpoint: Path) -> None:
    """Check that the trainer state in a checkpoint can be read, and that its step lies within its training.

    Raises:
        LightPeftError: the file is missing or damaged.
    """
    file = checkpoint / TRAINER_STATE_NAME
    with parsing(f"{file} is damaged", _USE_OLDER):
        state = TrainerState.load_from_json(str(file))
    step, steps = state.global_step, state.max_steps
    reached = type(step) is type(steps) is int and 0 <= step <= steps
    require(reached, f"{file} is damaged: it says step {short_repr(step)} of {short_repr(steps)}; {_USE_OLDER}")
    scaler = checkpoint / SCALER_NAME
    if scaler.is_file():
        with parsing(f"{checkpoint} is damaged: its gradient scaler cannot be read", _USE_OLDER):
            torch.amp.GradScaler("cpu").load_state_dict(torch.load(scaler, weights_only=True))
