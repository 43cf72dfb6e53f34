"""How long a run trains and at which rate: what `training.epochs: auto` and `training.learning_rate: auto` stand for.

The numbers are measured on MiniLM over small and large data (`benchmarks/first_runs.py`, docs/quality.md).
"""

from __future__ import annotations

import math
from dataclasses import replace

from lightpeft.config import RunConfig, TrainingConfig

LEAST_STEPS = 200
"""Optimizer steps that a run takes under `epochs: auto`, also where rows are few: below, PEFT has hardly moved."""
LEAST_EPOCHS = 3
"""Passes over the rows where these are enough steps."""
MOST_EPOCHS = 40
"""Passes over very few rows, which teach nothing new for ever."""
RATE, RATE_WIDTH = 1e-3, 384
"""Peak learning rate under `learning_rate: auto`, measured at this hidden size."""
LEAST_RATE = 3e-4
"""The rate of wide models (Gu et al. 2024 train LLaMA of 7 billion parameters, 4,096 wide, with it)."""


def steps_an_epoch(rows: int, config: TrainingConfig, processes: int = 1) -> int:
    """Optimizer steps of one pass over `rows` training rows."""
    batches = math.ceil(rows / (config.batch_size * processes))
    return math.ceil(batches / config.gradient_accumulation)


def total_steps(rows: int, config: TrainingConfig, processes: int = 1) -> int:
    """Optimizer steps of a whole run over `rows` training rows, whose `epochs` are a number."""
    return max(1, math.ceil(steps_an_epoch(rows, config, processes) * float(config.epochs)))


def least_examples(steps: int, rows: int, config: TrainingConfig, processes: int = 1) -> int:
    """Examples that any `steps` optimizer steps in a row see at least: an epoch's last step may have fewer."""
    of_epoch = steps_an_epoch(rows, config, processes)
    of_step = config.batch_size * config.gradient_accumulation * processes
    epochs, more = divmod(steps, of_epoch)
    return epochs * rows + (rows - (of_epoch - more) * of_step if more else 0)


def scored_steps(length: int) -> int:
    """How many steps of an estimation count for the scores: those of its second half."""
    return length - length // 2


def enough_steps(examples: int, rows: int, config: TrainingConfig, processes: int = 1) -> int:
    """Steps of the shortest estimation that scores so many examples; all of the run's, where none does."""
    steps = total_steps(rows, config, processes)
    lengths = (
        length
        for length in range(2, steps)
        if least_examples(scored_steps(length), rows, config, processes) >= examples
    )
    return next(lengths, steps)


def settled(config: RunConfig, rows: int, width: int | None, processes: int = 1) -> RunConfig:
    """The settings with numbers for `auto`, and `light.least_steps` that score `light.least_examples`.

    Args:
        rows: training rows.
        width: hidden size of the foundation model, if it has one.
    """
    training, light = config.training, config.light
    epochs = auto_epochs(steps_an_epoch(rows, training, processes)) if training.epochs == "auto" else training.epochs
    rate = auto_rate(width) if training.learning_rate == "auto" else training.learning_rate
    training = replace(training, epochs=epochs, learning_rate=rate)
    if config.method == "light":
        enough = max(2, enough_steps(light.least_examples, rows, training, processes))
        light = replace(light, least_steps=max(light.least_steps, enough))
    return replace(config, training=training, light=light)


def auto_epochs(steps: int) -> int:
    """Whole epochs, of so many steps each: `LEAST_STEPS` in all or more, within `LEAST_EPOCHS` and `MOST_EPOCHS`."""
    return min(max(math.ceil(LEAST_STEPS / max(steps, 1)), LEAST_EPOCHS), MOST_EPOCHS)


def auto_rate(width: int | None) -> float:
    """The rate of plain PEFT on a model so wide; it falls with the root of the width, from one known rate to the other.

    A model of unknown width counts as wide.
    """
    return max(LEAST_RATE, RATE * min(1.0, math.sqrt(RATE_WIDTH / width))) if width else LEAST_RATE
