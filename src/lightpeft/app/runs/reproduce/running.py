"""Run the cells of a grid one after another, each in its own processes, so that a crash ends only one cell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs.reproduce.grid import Cell, Grid, load_grid, selected
from lightpeft.app.runs.reproduce.results import Results, main_value, summarize
from lightpeft.app.runs.reproduce.saving import write_results
from lightpeft.app.runs.reuse import copy_estimation, copy_teacher_logits, estimation_settings
from lightpeft.console.progress import StepProgress
from lightpeft.errors import LightPeftError, require
from lightpeft.files import lock_folder
from lightpeft.machine import accelerator

Launch = Callable[[Cell, int, Path], str | None]
"""Runs a cell on a number of devices with its output in a file; returns the reason of a failure, or None."""


def reproduce(
    grid: Grid | str | Path,
    out: str | Path | None = None,
    only: Sequence[str] = (),
    devices: int | None = None,
    launch: Launch | None = None,
) -> Results:
    """Run the cells of a grid that are not done yet, and write the table of all finished cells after each of them.

    A failed cell is reported, the others still run, and the next call tries it again. A call that was killed continues
    where it was, also inside a cell.

    Args:
        grid: a grid, or its YAML file; paths in it are relative to the current folder.
        out: folder of the cells and the tables; None: runs/<folder of the file>/<its name>.
        only: run a part of the grid, as in "method=lora"; the table still has all that is done.
        devices: accelerators that a cell is spread over; None: all that are there. Without any, processes on the CPU.
        launch: runs a cell; None: `run_cell`.

    Returns:
        The results of all finished cells.

    Raises:
        LightPeftError: the grid is invalid, or `out` holds cells of another grid or is in use; nothing was run.
        KeyboardInterrupt: stopped; an unfinished cell left a checkpoint.

    Example:
        results = reproduce("configs/movie_reviews/grid.yaml", only=["method=lora", "seed=0"])
        print(results.rows[0].quality)
    """
    grid = grid if isinstance(grid, Grid) else load_grid(grid)
    out = grid.folder(out)
    devices = _device_count(devices)
    cells = [spread_over_devices(cell, devices) for cell in grid.cells(out)]
    chosen = selected(cells, only)
    failures: dict[str, str] = {}

    def write() -> Results:
        results = summarize(grid, cells, failures)
        write_results(out, results)
        return results

    with lock_folder(out):
        for cell in cells:
            RunFolder.open(cell.config)
        todo = [cell for cell in chosen if not cell.run.has("evaluate")]
        progress = StepProgress(len(chosen), len(chosen) - len(todo), "cells")
        results = write()
        for cell in todo:
            progress.begin()
            failure = _run(cell, cells, devices, launch or run_cell, out)
            if failure is not None:
                failures[cell.name] = failure
            results = write()
            progress.end(cell.name, f"failed: {failure}" if failure else main_value(results.reports[cell.name]))
        return results


# -- one cell ------------------------------------------------------------------------------------------------------


def _run(cell: Cell, cells: Sequence[Cell], devices: int, launch: Launch, out: Path) -> str | None:
    """Run a cell; returns why it failed, or None."""
    log = out / "logs" / ("-".join(cell.run.path.relative_to(out / "cells").parts) + ".txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        _reuse_estimation(cell, cells)
        _reuse_teacher(cell, cells)
        cell.run.begin()
    except LightPeftError as error:
        return str(error)
    failure = launch(cell, devices, log)
    if failure is None and not cell.run.has("evaluate"):
        return f"the process ended without a result; see {log}"
    return failure


def _device_count(devices: int | None) -> int:
    """Return the number of devices per cell: all of this machine by default; without accelerators, CPU processes."""
    there = torch.accelerator.device_count() if accelerator() else 0
    if devices is None:
        return max(there, 1)
    require(devices >= 1, f"--devices is {devices}; give at least 1")
    require(
        devices <= there or not there, f"--devices is {devices}, but this machine has {there}; give at most {there}"
    )
    return devices


def spread_over_devices(cell: Cell, devices: int) -> Cell:
    """The cell with its batch divided among devices: a step sees as many rows, whatever the machine."""
    training = cell.config.training
    require(
        training.batch_size % devices == 0,
        f"{cell.name}: training.batch_size {training.batch_size} cannot be divided among {devices} devices; change it, "
        "or give --devices",
    )
    share = replace(training, batch_size=training.batch_size // devices)
    return replace(cell, config=replace(cell.config, training=share))


def command(run: Sequence[str], devices: int) -> list[str]:
    """The command that runs a module with words: through `accelerate launch` where there are several devices."""
    if devices == 1:
        return [sys.executable, "-m", *run]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    # a port that is free, and nothing from a config file of the user's: the cell's own config says it all;
    # --multi_gpu is what starts several processes, on a CPU too: without it one would see a share of the rows
    options = ["--multi_gpu", "--num_machines", "1", "--num_processes", str(devices), "--main_process_port", "0"]
    return [*launcher, *options, "--mixed_precision", "no", "--dynamo_backend", "no", "--module", *run]


def run_cell(cell: Cell, devices: int, log: Path, module: Sequence[str] = ()) -> str | None:
    """Run a cell in its own process, and append the output to a file.

    Args:
        devices: accelerators or CPU processes of the cell.
        module: a module on the import path of this process, and its arguments; empty: `lightpeft run`.

    Returns:
        The reason of a failure, or None.

    Raises:
        KeyboardInterrupt: this process was stopped; the cell has written a checkpoint.
    """
    with log.open("ab") as output:
        # in a session of its own: Ctrl-C reaches the cell once, through `_wait`, and ends its step before it stops
        process = subprocess.Popen(
            command(module or ["lightpeft", "run", "--run", str(cell.run.path)], devices),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)} if module else None,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            close_fds=False,  # the lock of the folder goes with the cell
        )
        code = _wait(process)
    return None if code == 0 else _reason(code, log)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for a cell, and return its exit code; pass each Ctrl-C on to the cell."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        while process.poll() is None:
            process.terminate()
            try:
                process.wait()
            except KeyboardInterrupt:
                continue
        raise


def _reason(code: int, log: Path) -> str:
    """Return the reason of a failure: the signal, or the last error line of lightpeft, or the last line of the log."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    own = [line.partition(": ")[2] for line in lines if line.startswith("lightpeft: ")]
    killed = [f"killed by {signal.Signals(-code).name}"] if code < 0 else []
    return f"{(killed or own or lines or [f'exit code {code}'])[-1]} (see {log})"


# -- what cells share ----------------------------------------------------------------------------------------------


def _reuse_estimation(cell: Cell, others: Iterable[Cell]) -> None:
    """Copy the estimation of another cell with the same settings of estimation, if the cell has none and needs one.

    Raises:
        LightPeftError: the copy failed.
    """
    if not cell.config.method_spec.prunes or cell.run.has("estimate"):
        return
    wanted = _estimation_key(cell)
    for other in others:
        done = other.run.has("estimate") and "estimate" in other.run.finished_stages()
        if done and _estimation_key(other) == wanted:
            copy_estimation(other.run, cell.run, other.name)
            return


def _estimation_key(cell: Cell) -> tuple[bool, dict[str, Any]]:
    """Return the settings that a cell's estimation depends on, and whether anything is to be removed at all."""
    return cell.config.light.uses_scores, estimation_settings(cell.config)


def _reuse_teacher(cell: Cell, others: Iterable[Cell]) -> None:
    """Copy the teacher's logits of another cell with the same teacher and data, if the cell has none and needs them.

    Raises:
        LightPeftError: the copy failed.
    """
    config = cell.config
    if config.training.teacher is None or cell.run.has("teach"):
        return
    for other in others:
        same = (other.config.training.teacher, other.config.data) == (config.training.teacher, config.data)
        if same and "teach" in other.run.finished_stages():
            copy_teacher_logits(other.run, cell.run, other.name)
            return
