"""Lines, before training, about how much of the base a run will remove and why."""

from __future__ import annotations

from collections.abc import Iterator

from lightpeft.app.runs.workspace import Workspace
from lightpeft.budget.found import SHORT, fixed_budget
from lightpeft.budget.room import SEARCH_FRACTION, SearchRoom, why_unmeasured
from lightpeft.config import LightConfig
from lightpeft.machine import processes, sharding_launched


def why_fixed(work: Workspace) -> str | None:
    """Return why a run with `light: auto` cannot search for a budget; None: it can, or the budget is a number."""
    light = work.config.light
    if not light.is_auto:
        return None
    pace, depth = work.pace, light.remove.depth
    room = SearchRoom(
        rows=pace.rows,
        batch_size=work.config.training.batch_size,
        rows_per_step=pace.batch_size * pace.accumulation,
        processes=processes().num_processes,
        points=work.tolerance.unit == "points",
        sharded=sharding_launched(),
    )
    return why_unmeasured(room, light, work.steps, 0.0 if depth == "auto" else depth)


def expected_light(work: Workspace) -> LightConfig:
    """Return the `light` settings of a run, with the fixed budget in place of auto where no search is possible."""
    light = work.config.light
    if why_fixed(work) is None:
        return light
    return light.with_blocks(fixed_budget(work.tolerance.unit == "points"))


def expected_removal(work: Workspace) -> Iterator[str]:
    """Yield lines: how much `light: auto` will remove and why, and whether the run may stop early."""
    light = work.config.light
    fixed = why_fixed(work)
    if work.unable is not None:
        yield f"removes nothing: {work.unable}"
    elif fixed is not None and work.tolerance.unit == "points":
        yield f"removes {SHORT:.0%} of the blocks, or nothing if the loss hardly falls in estimation: {fixed}"
    elif fixed is not None:
        yield f"removes nothing of the blocks: {fixed}, and a fixed budget was measured on classifiers only"
    elif light.is_auto:
        most = f"which takes at most {SEARCH_FRACTION:.0%} of the time of plain PEFT's run"
        yield f"searches for the largest budget within the tolerance ({work.tolerance}) after estimation, {most}"
    if work.held_rows is not None and work.stops_early:
        rows = len(work.held_rows)
        yield f"stops before the last of its {work.steps} steps if the loss on {rows} held-out rows stops falling"
