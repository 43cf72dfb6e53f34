"""Length and learning rate of a run: the values of `training.epochs: auto` and `training.learning_rate: auto`.

The numbers were measured on MiniLM with small and large datasets (docs/explanation/results.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from transformers import TrainingArguments

from lightpeft.config import TrainingConfig
from lightpeft.errors import require
from lightpeft.training.host import Host

LEAST_RUN_STEPS = 200
"""Least optimizer steps of a run under `epochs: auto`: with fewer, PEFT weights have hardly changed."""
LEAST_EPOCHS = 3
"""Least epochs under `epochs: auto`."""
MOST_EPOCHS = 40
"""Most epochs under `epochs: auto`: very few rows teach nothing new after that."""
HELD_PART, FEWEST_HELD = 0.1, 40
"""Held-out training rows for early stopping in runs of more than `LEAST_EPOCHS`: a part of all rows, and a minimum."""
MOST_HELD_PART = 0.2
"""Largest part of the rows to hold out; if the minimum is more, no rows are held out."""
RATE, RATE_WIDTH = 1e-3, 384
"""Peak learning rate under `learning_rate: auto`, and the hidden size that it was measured at."""
LEAST_RATE = 3e-4
"""Learning rate of wide models (Gu et al. 2024 use it for LLaMA with 7 billion parameters, hidden size 4,096)."""

FULL_RATE = 2e-5
"""Peak learning rate under `learning_rate: auto` if all weights train (full fine-tuning)."""


@dataclass(frozen=True)
class Pace:
    """Rows and batch sizes of a run, and the optimizer steps that follow from them."""

    rows: int
    """Training rows."""
    batch_size: int
    """Rows per backward pass, over all processes."""
    accumulation: int = 1
    """Gradient accumulation: backward passes per optimizer step."""

    @classmethod
    def of(cls, rows: int, config: TrainingConfig, processes: int = 1) -> Pace:
        """Make the pace of a run from its settings."""
        return cls(rows, config.batch_size * processes, config.gradient_accumulation)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return math.ceil(math.ceil(self.rows / self.batch_size) / self.accumulation)

    def steps(self, epochs: float) -> int:
        """Return the optimizer steps of a run of so many epochs, at least 1."""
        return max(1, math.ceil(self.steps_per_epoch * epochs))

    def least_examples(self, steps: int) -> int:
        """Return the least number of rows in any `steps` consecutive optimizer steps; an epoch's last step may have
        fewer."""
        of_step = self.batch_size * self.accumulation
        epochs, more = divmod(steps, self.steps_per_epoch)
        return epochs * self.rows + (self.rows - (self.steps_per_epoch - more) * of_step if more else 0)

    def enough_steps(self, examples: int, steps: int) -> int:
        """Return the steps of the shortest estimation that scores so many examples; `steps` if none is long enough.

        Args:
            steps: optimizer steps of the whole run.
        """
        lengths = (length for length in range(2, steps) if self.least_examples(scored_steps(length)) >= examples)
        return next(lengths, steps)


class Schedule:
    """Learning rate and scheduler steps of a trainer, unchanged; `LightSchedule` changes them at the cut."""

    def set_rate(self) -> None:
        """Set the trainer's learning rate for the parameters that it trains."""

    def steps(self, of_run: int) -> int:
        """Return the steps of the next scheduler.

        Args:
            of_run: optimizer steps of the whole run.
        """
        return of_run


def pace_of(trainer: Host) -> Pace | None:
    """Return the pace of a trainer; None if its dataset has no length."""
    args = trainer.args
    try:
        rows = len(trainer.train_dataset)
    except TypeError:
        return None
    require(rows > 0, "the training dataset is empty; give it rows")
    return Pace(rows, args.train_batch_size * args.world_size, args.gradient_accumulation_steps)


def pace_of_steps(trainer: Host) -> Pace | None:
    """Return the pace of a trainer for the rows of its steps; if its dataset has no length, one epoch is `max_steps`.

    Without a length and without `max_steps` it is None.
    """
    args = trainer.args
    pace = pace_of(trainer)
    if pace is not None or args.max_steps <= 0:
        return pace
    batch = args.train_batch_size * args.world_size
    return Pace(batch * args.gradient_accumulation_steps * args.max_steps, batch, args.gradient_accumulation_steps)


def steps_of(trainer: Host) -> int | None:
    """Return the optimizer steps of a trainer's run; None if it has no `max_steps` and its dataset has no length."""
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    pace = pace_of(trainer)
    return None if pace is None else pace.steps(trainer.args.num_train_epochs)


def name_of_length(args: TrainingArguments, usual: str = "num_train_epochs") -> str:
    """Return the name of the argument that makes a trainer's run longer.

    Args:
        usual: name if `max_steps` is not set.
    """
    return "max_steps" if args.max_steps > 0 else usual


def scored_steps(length: int) -> int:
    """Return the number of estimation steps that count for the scores: the second half.

    Args:
        length: steps of the estimation.
    """
    return length - length // 2


def resolve_auto(
    config: TrainingConfig, rows: int, width: int | None, processes: int = 1, has_peft: bool = True
) -> TrainingConfig:
    """Return the settings with numbers in place of `auto`.

    Args:
        rows: training rows.
        width: hidden size of the base model; None: not known.
        has_peft: True if PEFT modules train; False: all weights do.
    """
    epochs = auto_epochs(Pace.of(rows, config, processes).steps_per_epoch) if config.epochs == "auto" else config.epochs
    rate = config.learning_rate
    if rate == "auto":
        rate = auto_rate(width) if has_peft else FULL_RATE
    return replace(config, epochs=epochs, learning_rate=rate)


def rows_held(rows: int, epochs: float) -> int:
    """Return the number of training rows to hold out for early stopping; 0: no early stopping.

    Args:
        rows: training rows.
        epochs: value of `training.epochs: auto`; with more than `LEAST_EPOCHS`, the model may overfit to few rows.
    """
    held = max(FEWEST_HELD, int(HELD_PART * rows))
    return held if epochs > LEAST_EPOCHS and held <= MOST_HELD_PART * rows else 0


def auto_epochs(steps: int) -> int:
    """Return the epochs under `epochs: auto`: `LEAST_RUN_STEPS` steps or more, within `LEAST_EPOCHS` and `MOST_EPOCHS`.

    Args:
        steps: optimizer steps per epoch.
    """
    return min(max(math.ceil(LEAST_RUN_STEPS / max(steps, 1)), LEAST_EPOCHS), MOST_EPOCHS)


def auto_rate(width: int | None) -> float:
    """Return plain PEFT's learning rate for a hidden size: `RATE` falls with its square root down to `LEAST_RATE`.

    Args:
        width: hidden size; None: not known, counts as wide.
    """
    return max(LEAST_RATE, RATE * min(1.0, math.sqrt(RATE_WIDTH / width))) if width else LEAST_RATE
