"""Estimation does not depend on what is removed, so cells that differ in nothing else share one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from lightpeft.config import READ_BY_PLANS, RunConfig
from lightpeft.errors import LightPeftError
from lightpeft.reproduce.grid import Cell
from lightpeft.runs import RunFolder
from lightpeft.training import append_line

_AFTERWARDS = frozenset({"refit", "refit_rank", "refit_rows", "restart"})
"""Settings of `light`, beside those of plans, that are read when estimation is over."""


def estimation_settings(config: RunConfig) -> dict[str, Any]:
    """All settings that the scores depend on."""
    settings = asdict(config)
    # `length: auto` compares plans, so that it may end elsewhere under another budget
    later = _AFTERWARDS if config.light.length == "auto" else _AFTERWARDS | READ_BY_PLANS
    light = {name: value for name, value in settings["light"].items() if name not in later}
    return {**settings, "light": light, "output": None, "preset": None}


def take_estimation(cell: Cell, others: Iterable[Cell]) -> str | None:
    """Give a cell the estimation of another one that has the same; its time and memory count for both.

    Returns:
        The name of the other cell; None where the cell has an estimation, needs none, or nobody has it.

    Raises:
        LightPeftError: it cannot be copied.
    """
    run = cell.run
    if cell.config.method != "light" or run.has("estimate"):
        return None
    wanted = estimation_settings(cell.config)
    for other in others:
        if other.run.has("estimate") and estimation_settings(other.config) == wanted:
            _copy(other.run, run, other.name)
            return other.name
    return None


def _copy(donor: RunFolder, run: RunFolder, name: str) -> None:
    """The folder comes whole or not at all, and the log says whose it is."""
    entry = donor.finished_stages().get("estimate")
    if entry is None:  # the donor was killed between the two
        return
    run.begin()
    temporary = run.path / f".estimation.{os.getpid()}.tmp"
    try:
        shutil.copytree(donor.estimation, temporary)
        append_line(run.log, {**entry, "taken_from": name})
        shutil.rmtree(run.estimation, ignore_errors=True)
        temporary.rename(run.estimation)
    except OSError as error:
        raise LightPeftError(f"cannot copy {donor.estimation} to {run.estimation}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
