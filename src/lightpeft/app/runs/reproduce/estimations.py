"""Cells of a grid that differ in nothing that estimation depends on share one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightpeft.app.runs.reproduce.grid import Cell
from lightpeft.app.runs.reuse import copy_estimation, estimation_settings


def take_estimation(cell: Cell, others: Iterable[Cell]) -> str | None:
    """Give a cell the estimation of another one that has the same; its time and memory count for both.

    Returns:
        The name of the other cell; None where the cell has an estimation, needs none, or nobody has it. What a call of
        their own estimates is not known, so cells with one neither take nor give.

    Raises:
        LightPeftError: it cannot be copied.
    """
    if not cell.config.way.prunes or cell.call is not None or cell.run.has("estimate"):
        return None
    wanted = _asked(cell)
    for other in others:
        done = other.run.has("estimate") and "estimate" in other.run.finished_stages()
        if done and other.call is None and _asked(other) == wanted:
            copy_estimation(other.run, cell.run, other.name)
            return other.name
    return None


def _asked(cell: Cell) -> tuple[bool, dict[str, Any]]:
    """What of a cell's settings its estimation depends on; where nothing is to go, none is made."""
    return cell.config.light.chooses, estimation_settings(cell.config)
