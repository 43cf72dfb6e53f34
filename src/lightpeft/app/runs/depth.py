"""`light.remove.depth: auto`: how many blocks a run leaves out, found before its estimation."""

from __future__ import annotations

import time
from typing import Any

from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs.workspace import Workspace, with_found_depth
from lightpeft.files import read_json, write_json
from lightpeft.machine import autocast_dtype
from lightpeft.prune.depth_probes import DECODERS_ONLY, PROBE_ROWS, find_depth, is_classifying_decoder
from lightpeft.recipe.parallel import broadcast_from_main


def settle_depth(work: Workspace) -> None:
    """Replace `light.remove.depth: auto` by a number: find it, and write it into the run folder.

    Raises:
        LightPeftError: the depth cannot be found from the rows, or its file is damaged.
    """
    if work.config.light.remove.depth == "auto":
        with work.run.held():
            _leave_depth(work)
        work.config = with_found_depth(work.config, work.run)


def found_depth(run: RunFolder) -> dict[str, Any] | None:
    """Read the depth that `light.remove.depth: auto` found; None: none yet.

    Raises:
        LightPeftError: the file is damaged.
    """
    return read_json(run.depth) if run.has("depth") else None


def _leave_depth(work: Workspace) -> None:
    started, facts = time.perf_counter(), _find(work)
    left_out = f"light.remove.depth: auto leaves out {facts['depth']:.0%} of the blocks"
    work.run.announce("depth", f"{left_out}: {facts['reason']}")
    work.run.finish_stage("depth", time.perf_counter() - started, lambda: write_json(work.run.depth, facts))


def _find(work: Workspace) -> dict[str, Any]:
    model = work.dense_model(to_train=True).model
    if not is_classifying_decoder(model):
        return {"depth": 0.0, "reason": DECODERS_ONLY}
    found = broadcast_from_main(find_depth(model, work.drawn_batches(PROBE_ROWS), autocast_dtype(work.config.training)))
    return {**found.facts(), "depth": found.within(work.config.light.remove.blocks), "reason": found.summary()}
