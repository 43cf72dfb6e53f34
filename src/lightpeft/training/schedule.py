"""How long a run trains and at which rate: what `training.epochs: auto` and `training.learning_rate: auto` stand for.

The numbers are measured on MiniLM over small and large data (docs/explanation/results.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lightpeft.config import TrainingConfig
from lightpeft.training.host import Host

LEAST_STEPS = 200
"""Optimizer steps that a run takes under `epochs: auto`, also where rows are few: below, PEFT has hardly moved."""
LEAST_EPOCHS = 3
"""Passes over the rows where these are enough steps."""
MOST_EPOCHS = 40
"""Passes over very few rows, which teach nothing new for ever."""
HELD_PART, FEWEST_HELD = 0.1, 40
"""Training rows that a run of more epochs sets aside, to stop where the loss on them turns: a part, and at least so
many."""
MOST_HELD_PART = 0.2
"""Part of the rows that these may be; of fewer than would tell something, none are."""
RATE, RATE_WIDTH = 1e-3, 384
"""Peak learning rate under `learning_rate: auto`, measured at this hidden size."""
LEAST_RATE = 3e-4
"""The rate of wide models (Gu et al. 2024 train LLaMA of 7 billion parameters, 4,096 wide, with it)."""

FULL_RATE = 2e-5
"""Peak learning rate under `learning_rate: auto` where every weight trains."""


@dataclass(frozen=True)
class Pace:
    """How fast a run goes through its rows."""

    rows: int
    batch_size: int
    """Rows a backward pass, of all processes together."""
    accumulation: int = 1
    """Backward passes an optimizer step."""

    @classmethod
    def of(cls, rows: int, config: TrainingConfig, processes: int = 1) -> Pace:
        """That of a run's settings."""
        return cls(rows, config.batch_size * processes, config.gradient_accumulation)

    @property
    def steps_an_epoch(self) -> int:
        """Optimizer steps of one pass over the rows."""
        return math.ceil(math.ceil(self.rows / self.batch_size) / self.accumulation)

    def steps(self, epochs: float) -> int:
        """Optimizer steps of a whole run."""
        return max(1, math.ceil(self.steps_an_epoch * epochs))

    def least_examples(self, steps: int) -> int:
        """Examples that any `steps` optimizer steps in a row see at least: an epoch's last step may have fewer."""
        of_step = self.batch_size * self.accumulation
        epochs, more = divmod(steps, self.steps_an_epoch)
        return epochs * self.rows + (self.rows - (self.steps_an_epoch - more) * of_step if more else 0)

    def enough_steps(self, examples: int, steps: int) -> int:
        """Steps of the shortest estimation that scores so many examples; all `steps` of the run, where none does."""
        lengths = (length for length in range(2, steps) if self.least_examples(scored_steps(length)) >= examples)
        return next(lengths, steps)


class Schedule:
    """Rate and steps of a trainer's optimizer: those that the trainer was given."""

    def set_rate(self) -> None:
        """Give the trainer the learning rate of what it trains."""

    def steps(self, of_run: int) -> int:
        """Steps of the scheduler that is made, in a run of so many."""
        return of_run


def pace_of(trainer: Host) -> Pace | None:
    """How fast a trainer goes through its rows; None where these are not counted."""
    args = trainer.args
    try:
        rows = len(trainer.train_dataset)
    except TypeError:
        return None
    return Pace(rows, args.train_batch_size * args.world_size, args.gradient_accumulation_steps)


def steps_of(trainer: Host) -> int | None:
    """Optimizer steps of a trainer's whole run; None where neither these nor its rows are counted."""
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    pace = pace_of(trainer)
    return None if pace is None else pace.steps(trainer.args.num_train_epochs)


def scored_steps(length: int) -> int:
    """How many steps of an estimation count for the scores: those of its second half."""
    return length - length // 2


def settled(
    config: TrainingConfig, rows: int, width: int | None, processes: int = 1, has_peft: bool = True
) -> TrainingConfig:
    """The settings with numbers for `auto`.

    Args:
        rows: training rows.
        width: hidden size of the foundation model, if it has one.
        has_peft: whether PEFT modules train, and not every weight.
    """
    epochs = auto_epochs(Pace.of(rows, config, processes).steps_an_epoch) if config.epochs == "auto" else config.epochs
    rate = config.learning_rate
    if rate == "auto":
        rate = auto_rate(width) if has_peft else FULL_RATE
    return replace(config, epochs=epochs, learning_rate=rate)


def rows_held(rows: int, epochs: float) -> int:
    """How many training rows are set aside to tell where training is to stop; 0 where it runs to its end.

    Args:
        rows: training rows.
        epochs: that `training.epochs: auto` stands for; more than `LEAST_EPOCHS` go through few rows so often that a
            model may learn them by heart.
    """
    held = max(FEWEST_HELD, int(HELD_PART * rows))
    return held if epochs > LEAST_EPOCHS and held <= MOST_HELD_PART * rows else 0


def auto_epochs(steps: int) -> int:
    """Whole epochs, of so many steps each: `LEAST_STEPS` in all or more, within `LEAST_EPOCHS` and `MOST_EPOCHS`."""
    return min(max(math.ceil(LEAST_STEPS / max(steps, 1)), LEAST_EPOCHS), MOST_EPOCHS)


def auto_rate(width: int | None) -> float:
    """The rate of plain PEFT on a model so wide; it falls with the root of the width, from one known rate to the other.

    A model of unknown width counts as wide.
    """
    return max(LEAST_RATE, RATE * min(1.0, math.sqrt(RATE_WIDTH / width))) if width else LEAST_RATE
