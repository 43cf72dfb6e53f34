"""`lightpeft plan --curve`: what each budget would remove from an estimated run, and the loss right after that cut."""

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
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.profiling.surroundings import hardware

CURVE_ROWS = 256
"""Default number of training rows on which the losses are measured."""
_BATCH = 8
"""Rows per batch: many small batches give the interval of the mean loss."""


def curve(work: Workspace, parts: Sequence[float] = CURVE_BUDGETS, rows: int = CURVE_ROWS) -> dict[str, Any]:
    """Measure the loss at some budgets of a run whose estimation is done, and write `curve.json` into its folder.

    The rows are training rows drawn by the run's seed; estimation may have seen some of them.

    Args:
        parts: budgets, each a part of the blocks' parameters to remove.
        rows: number of training rows on which the losses are measured.

    Raises:
        LightPeftError: estimation is not done, a part or the number of rows is out of range, or no budget can be met.
    """
    run = work.run
    run.need("estimate", "plan --curve")
    require(rows > _BATCH, f"--rows: {rows} rows are too few; give more than {_BATCH}")
    record = EstimationRecord.load(run.estimation)
    # a cut of ranks throws away what they have learned, which hides all else
    plans = dict(nested_plans(record, work.config.light.with_all_modules(), parts))
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
