"""`lightpeft plan --curve`: what each budget of an estimated run would take and cost, before one is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs.stages import estimated_model
from lightpeft.app.runs.workspace import Workspace
from lightpeft.budget.curve import CURVE_BUDGETS, gone_before, loss_curve, nested_plans
from lightpeft.errors import require
from lightpeft.files import write_json
from lightpeft.machine import autocast_dtype
from lightpeft.plans.records import EstimationRecord
from lightpeft.profiling.surroundings import hardware

ROWS = 256
"""Training rows that losses are measured on."""
_BATCH = 8
"""Rows a batch: many small ones tell how sure a mean is."""


def curve(work: Workspace, parts: Sequence[float] = CURVE_BUDGETS, rows: int = ROWS) -> dict[str, Any]:
    """Measure the budgets of a run whose estimation is done, and leave `curve.json` in its folder.

    Losses are those of training rows, drawn by the run's seed, of which estimation may have seen some.

    Args:
        parts: of the blocks' parameters.
        rows: training rows that losses are measured on.

    Raises:
        LightPeftError: estimation is not done, a part or the number of rows is no such, or no budget can be met.
    """
    run = work.run
    run.need("estimate", "plan --curve")
    require(rows > _BATCH, f"--rows is {rows}; a curve needs more than {_BATCH}")
    record = EstimationRecord.load(run.estimation)
    # a cut of ranks throws away what they have learned, which hides all else
    plans = dict(nested_plans(record, work.config.light.with_whole_modules(), parts))
    model = estimated_model(work, record)
    batches = work.drawn_batches(rows, _BATCH)
    dense, points = loss_curve(model, plans, batches, autocast_dtype(work.config.training))
    found = {
        "rows": sum(len(batch["input_ids"]) for batch in batches),
        "loss": dense,
        "gone_before": gone_before(record),
        "points": [asdict(point) for point in points],
        "seed": work.config.seed,
        "hardware": hardware(),
    }
    with RunFolder.at(run.path).held():  # with its own budget, whatever else was asked about
        write_json(run.curve, found)
    return found
