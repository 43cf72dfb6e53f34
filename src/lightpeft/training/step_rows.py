"""How many rows a step takes: as many from a training's beginning to its end, by however many processes."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from lightpeft.errors import require
from lightpeft.files import explain_content_errors, read_json, write_json

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


def _read_step(folder: Path) -> tuple[int, int]:
    step = read_json(folder / _STEP)
    with explain_content_errors(folder / _STEP):
        return int(step["rows"]), int(step["processes"])
