"""`light.depth: auto`: how many blocks a run leaves out, found before its estimation."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from lightpeft.files import read_json, understandable, write_json
from lightpeft.machine import autocast_dtype
from lightpeft.models.families.decoders import DECODERS
from lightpeft.models.loading import load_model_config
from lightpeft.models.task_heads import CLASSIFICATION
from lightpeft.prune.reading import ROWS, FoundDepth, find_depth
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
    started, reason = time.perf_counter(), _unknown(work)
    facts = _read(work) if reason is None else {"depth": 0.0, "reason": reason}
    work.run.announce("depth", f"light.depth: auto leaves out {facts['depth']:.0%} of the blocks: {facts['reason']}")
    work.run.finish_stage("depth", time.perf_counter() - started, lambda: write_json(work.run.depth, facts))


def _read(work: Workspace) -> dict[str, Any]:
    model, autocast = work.dense_model(to_train=True).model, autocast_dtype(work.config.training)
    found: FoundDepth = agreed(find_depth(model, work.drawn_batches(ROWS), autocast))
    most = work.config.light.blocks
    depth = found.depth if most is None or most == "auto" else found.within(most)
    return {**found.facts(), "depth": depth, "reason": found.summary()}


def _unknown(work: Workspace) -> str | None:
    """Why it is not known what the upper blocks of a model do for a task; None: it is."""
    if work.task.head != CLASSIFICATION:
        return "only models that classify are known to bear it"
    if load_model_config(work.config.model).model_type not in {family.model_type for family in DECODERS}:
        return "only decoders are known to bear it"
    return None
