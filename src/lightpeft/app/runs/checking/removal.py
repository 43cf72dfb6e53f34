"""What of the base a run is going to remove, and why: said before anything trains."""

from __future__ import annotations

from collections.abc import Iterator

from lightpeft.app.runs.workspace import Workspace
from lightpeft.budget.found import SHORT, fixed_budget
from lightpeft.budget.room import SEARCH_FRACTION, SearchRoom, why_unmeasured
from lightpeft.config import LightConfig
from lightpeft.machine import processes, sharding_launched


def why_fixed(work: Workspace) -> str | None:
    """Why a run that is told no budget cannot search for one; None: it can, or is told."""
    light = work.config.light
    if not light.is_auto:
        return None
    pace, depth = work.pace, light.remove.depth
    room = SearchRoom(
        rows=pace.rows,
        batch_size=work.config.training.batch_size,
        rows_a_step=pace.batch_size * pace.accumulation,
        processes=processes().num_processes,
        points=work.tolerance.unit == "points",
        sharded=sharding_launched(),
    )
    return why_unmeasured(room, light, work.steps, 0.0 if depth == "auto" else depth)


def expected_light(work: Workspace) -> LightConfig:
    """The settings of a run, with the budget that it will have where that is known before."""
    light = work.config.light
    if why_fixed(work) is None:
        return light
    return light.removing(fixed_budget(work.tolerance.unit == "points"))


def expected_removal(work: Workspace) -> Iterator[str]:
    """What a light run that is told no budget will remove and why, and where any run will stop, a line each."""
    light = work.config.light
    fixed = why_fixed(work)
    if work.unable is not None:
        yield f"removes nothing: {work.unable}"
    elif fixed is not None and work.tolerance.unit == "points":
        yield f"removes {SHORT:.0%} of the blocks, or nothing if estimation teaches nothing: {fixed}"
    elif fixed is not None:
        yield f"removes nothing of the blocks: {fixed}, and what a fixed budget costs is known of classifiers alone"
    elif light.is_auto:
        most = f"in at most {SEARCH_FRACTION:.0%} of the time of plain PEFT's run"
        yield f"searches for the part of the blocks that {work.tolerance} bears, when estimation is over, {most}"
    if work.held_rows is not None and work.stops_early:
        yield f"stops before its {work.steps} steps are over if the loss on {len(work.held_rows)} rows aside turns"
