"""How many rows a step takes: as many from a training's beginning to its end, by however many processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import TrainingArguments

from lightpeft.config import TrainingConfig
from lightpeft.errors import LightPeftError, require
from lightpeft.files import read_json, understandable, write_json
from lightpeft.training.checkpoints import step_of

_STEP = "lightpeft_step.json"
"""What says in a checkpoint how many rows a step takes, and by how many processes."""


def rows_a_step(args: TrainingArguments) -> int:
    """Rows of an optimizer step, of all processes together."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def write_step(folder: Path, args: TrainingArguments) -> None:
    """Note in a checkpoint how many rows its training takes a step.

    Raises:
        LightPeftError: it cannot be written.
    """
    write_json(folder / _STEP, {"rows": rows_a_step(args), "processes": args.world_size})


def check_step(folder: Path, args: TrainingArguments) -> None:
    """Refuse to go on from a checkpoint by steps of another size: its schedule, and what it has seen, would be wrong.

    Any number of processes may go on that take as many rows a step together.

    Raises:
        LightPeftError: they take more or fewer.
    """
    if not (folder / _STEP).is_file():
        return
    rows, processes = _read_step(folder)
    require(
        rows == rows_a_step(args),
        f"{folder} is of a training with {rows} rows a step, from {processes} process(es), and this one takes "
        f"{rows_a_step(args)}, in {args.world_size}; start {processes}, or give each process as many rows as make it "
        f"{rows}",
    )


def rows_a_step_before(checkpoints: Path) -> int | None:
    """Rows of a step by what the newest whole note in a folder of checkpoints says; None without any."""
    for checkpoint in sorted((file.parent for file in checkpoints.glob(f"checkpoint-*/{_STEP}")), key=step_of)[::-1]:
        try:
            return _read_step(checkpoint)[0]
        except LightPeftError:  # who resumes names and removes what is damaged
            continue
    return None


def _read_step(folder: Path) -> tuple[int, int]:
    step = read_json(folder / _STEP)
    with understandable(folder / _STEP):
        return int(step["rows"]), int(step["processes"])


def shared(config: TrainingConfig, rows: int, processes: int) -> TrainingConfig:
    """The settings by which each of some processes takes its part of a step, and never more at once than the config's.

    Args:
        rows: of a step, of all processes together.

    Raises:
        LightPeftError: the processes cannot take equally many.
    """
    fitting = [str(count) for count in range(1, 4 * processes) if rows % count == 0]
    require(
        rows % processes == 0,
        f"training goes on with {rows} rows a step, as it began, which {processes} processes cannot share equally; "
        f"start one of {', '.join(fitting)}",
    )
    share = rows // processes
    at_once = next(size for size in range(min(config.batch_size, share), 0, -1) if share % size == 0)
    return replace(config, batch_size=at_once, gradient_accumulation=share // at_once)
