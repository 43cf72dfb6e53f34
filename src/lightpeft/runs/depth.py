"""`light.depth: auto`: how many blocks a run leaves out, found before its estimation."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from lightpeft.files import read_json, understandable, write_json
from lightpeft.machine import autocast_dtype
from lightpeft.prune.reading import ROWS, UNKNOWN, find_depth, is_known
from lightpeft.recipe.parallel import agreed
from lightpeft.runs.workspace import Workspace
from lightpeft.saved.run_folder import RunFolder


def with_depth(work: Workspace) -> Workspace:
    """The run with a number for its depth. Where that is auto it is found, and left in the folder, unless it is there.

    Raises:
        LightPeftError: the rows do not tell, or the file is damaged.
    """
    light = work.config.light
    if light.depth != "auto":
        return work
    if not work.run.has("depth"):
        with work.run.held():
            _leave_depth(work)
    found = read_json(work.run.depth)
    with understandable(work.run.depth):
        return replace(work, config=replace(work.config, light=replace(light, depth=float(found["depth"]))))


def found_depth(run: RunFolder) -> dict[str, Any] | None:
    """What `light.depth: auto` found; None: nothing yet.

    Raises:
        LightPeftError: the file is damaged.
    """
    return read_json(run.depth) if run.has("depth") else None


def _leave_depth(work: Workspace) -> None:
    started, facts = time.perf_counter(), _found(work)
    work.run.announce("depth", f"light.depth: auto leaves out {facts['depth']:.0%} of the blocks: {facts['reason']}")
    work.run.finish_stage("depth", time.perf_counter() - started, lambda: write_json(work.run.depth, facts))


def _found(work: Workspace) -> dict[str, Any]:
    model = work.dense_model(to_train=True).model
    if not is_known(model):
        return {"depth": 0.0, "reason": UNKNOWN}
    found = agreed(find_depth(model, work.drawn_batches(ROWS), autocast_dtype(work.config.training)))
    return {**found.facts(), "depth": found.within(work.config.light.blocks), "reason": found.summary()}
