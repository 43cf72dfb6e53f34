"""Rows per optimizer step (global batch), which must stay the same when a run resumes on other processes."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from lightpeft.errors import require
from lightpeft.files import explain_content_errors, read_json, write_json

_STEP = "lightpeft_step.json"
"""File in a checkpoint with the rows per optimizer step and the number of processes."""


def rows_per_step(args: TrainingArguments) -> int:
    """Return the rows per optimizer step over all processes (global batch)."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def write_step(folder: Path, args: TrainingArguments) -> None:
    """Write the rows per optimizer step into a checkpoint.

    Raises:
        LightPeftError: the file cannot be written.
    """
    write_json(folder / _STEP, {"rows": rows_per_step(args), "processes": args.world_size})


def check_step(folder: Path, args: TrainingArguments) -> None:
    """Refuse to resume with another global batch: the schedule and the rows that were seen would be wrong.

    The number of processes may change if the global batch stays the same.

    Raises:
        LightPeftError: the global batch differs from the checkpoint's.
    """
    if not (folder / _STEP).is_file():
        return
    rows, processes = _read_step(folder)
    require(
        rows == rows_per_step(args),
        f"{folder} was trained with a global batch of {rows} rows in {processes} process(es), and this run has "
        f"{rows_per_step(args)} in {args.world_size}; start {processes}, or change per-device batch size or gradient "
        f"accumulation to get {rows}",
    )


def _read_step(folder: Path) -> tuple[int, int]:
    step = read_json(folder / _STEP)
    with explain_content_errors(folder / _STEP):
        return int(step["rows"]), int(step["processes"])
