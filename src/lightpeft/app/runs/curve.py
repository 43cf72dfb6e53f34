"""`lightpeft plan --curve`: what each budget of an estimated run would take, save and cost, before one is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from peft import PeftModel

from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs.bench import accelerating, adamw, sample_batches
from lightpeft.app.runs.stages import estimated_model
from lightpeft.app.runs.workspace import Workspace
from lightpeft.budget.curve import PARTS, gone_before, loss_curve, nested_plans
from lightpeft.errors import require
from lightpeft.files import write_json
from lightpeft.machine import autocast_dtype
from lightpeft.plans.records import EstimationRecord, PrunePlan
from lightpeft.profiling.comparing import Spread, alternate, ratio
from lightpeft.profiling.speed import measure_training
from lightpeft.profiling.surroundings import hardware
from lightpeft.prune.surgery import cut_copy

ROWS = 256
"""Training rows that losses are measured on."""
_BATCH = 8
"""Rows a batch: many small ones tell how sure a mean is."""
_ROUNDS = 3


def curve(work: Workspace, parts: Sequence[float] = PARTS, rows: int = ROWS) -> dict[str, Any]:
    """Measure the budgets of a run whose estimation is done, and leave `curve.json` in its folder.

    Losses are those of training rows, drawn by the run's seed, of which estimation may have seen some. Time is that of
    a training step at two of the budgets, with the modules and ranks that they keep, beside a step with nothing cut, of
    one batch in three alternating rounds; of the others it is read off the line through these. Beside the model
    a copy of it is in memory, as far as it is cut.

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
    light = work.config.light
    # a cut of ranks throws away what they have learned, which hides all else
    plans = dict(nested_plans(record, light.with_whole_modules(), parts))
    model = estimated_model(work, record)
    batches = work.drawn_batches(rows, _BATCH)
    dense, points = loss_curve(model, plans, batches, autocast_dtype(work.config.training))
    start = gone_before(record)
    times = step_times(work, model, dict(nested_plans(record, light, [*plans])), start)
    found = {
        "rows": sum(len(batch["input_ids"]) for batch in batches),
        "loss": dense,
        "gone_before": start,
        "points": [{**asdict(point), "step_time": times(point.removed_of_blocks)} for point in points],
        "step_times": {f"{part:g}": asdict(spread) for part, spread in times.measured.items()},
        "seed": work.config.seed,
        "hardware": hardware(),
    }
    with RunFolder.at(run.path).held():  # with its own budget, whatever else was asked about
        write_json(run.curve, found)
    return found


class StepTimes:
    """Time of a training step by what is gone, of that with nothing gone: measured at some places, a line between."""

    def __init__(self, measured: Mapping[float, Spread], removed: Mapping[float, float], start: float = 0.0) -> None:
        """
        Args:
            measured: by budget.
            removed: what is gone at these budgets.
            start: what is gone with nothing cut.
        """
        self.measured = measured
        self._places = [(start, 1.0), *sorted((removed[part], spread.median) for part, spread in measured.items())]

    def __call__(self, removed: float) -> float:
        """Of a step where such a part of the blocks is gone."""
        places = self._places
        at = max(1, next((i for i, (place, _) in enumerate(places) if place >= removed), len(places) - 1))
        (before, low), (after, high) = places[at - 1], places[at]
        return low + (high - low) * (removed - before) / (after - before)


def step_times(work: Workspace, model: PeftModel, plans: Mapping[float, PrunePlan], start: float = 0.0) -> StepTimes:
    """Times of steps as a light run makes them, with LoRA as estimation had it; the model trains a little."""
    chosen = sorted({list(plans)[len(plans) // 2], list(plans)[-1]})
    batches = sample_batches(work, 1)

    def seconds(of: PeftModel) -> Callable[[], float]:
        def measure() -> float:
            with accelerating(work, of):
                return sum(measure_training(of, batches, adamw(work), warmup=1, **work.step_options))

        return measure

    measured = {}
    for part in chosen:
        cut = cut_copy(model, plans[part])
        rounds = alternate({"cut": seconds(cut), "dense": seconds(model)}, _ROUNDS)
        measured[part] = ratio(rounds["cut"], rounds["dense"])
        del cut
    return StepTimes(measured, {part: plans[part].removed_of_blocks for part in chosen}, start)
