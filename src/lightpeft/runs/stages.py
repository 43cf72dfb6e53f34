"""What the stages of a light run leave in its folder, whoever runs them: one after another, or a trainer on its way."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

from peft import PeftModel

from lightpeft.errors import require
from lightpeft.machine import processes
from lightpeft.plans.planning import make_plan
from lightpeft.plans.records import EstimationRecord, PrunePlan
from lightpeft.profiling import MemoryMethod
from lightpeft.prune.refit import Batches, Fit, fit_refit
from lightpeft.recipe.pruner import cut
from lightpeft.runs.workspace import Workspace
from lightpeft.saved.light_adapter import LightModel
from lightpeft.saved.results import save_peft
from lightpeft.saved.run_folder import RunFolder
from lightpeft.tasks import task_facts


@dataclass(frozen=True)
class StageCost:
    """What a training stage took, as metrics.json has it."""

    seconds: float
    """Wall-clock time, that of storing a frozen prefix included; of a resumed stage, that of its last part."""
    samples_per_second: float
    """Training rows a second of all processes together, that time left out."""
    peak_memory_bytes: int
    """Peak of training: on CUDA all that was allocated, else what came on top of the loaded model."""
    peak_memory_method: MemoryMethod
    resumed_at: int
    """Step of the run that the last part of the stage began at; 0 for a stage that was not interrupted."""


def leave_estimation(work: Workspace, model: PeftModel, record: EstimationRecord, cost: StageCost) -> None:
    """Scores and PEFT weights at the end of the stage."""
    run = work.run

    def save() -> None:
        save_peft(model, run.estimation / "adapter")
        record.save(run.estimation)

    run.finish_stage("estimate", **asdict(cost), save=save, steps=record.meta["steps"])


def leave_plan(run: RunFolder) -> PrunePlan:
    """Decide from the record and the budget which units stay."""
    result = make_plan(EstimationRecord.load(run.estimation), run.config.light)
    if run.has("plan") and run.has("prune"):
        unchanged = PrunePlan.load(run.plan) == result
        require(unchanged, f"{run.path} was pruned by another plan already; give another output for this budget")
        return result
    if processes().is_main_process:
        result.save(run.plan)
    processes().wait_for_everyone()
    return result


def leave_pruned(
    work: Workspace, model: PeftModel, plan: PrunePlan, calibration: Batches, fit: Fit = fit_refit
) -> LightModel:
    """Cut the model as estimation left it, in place, look at it before and after, and save it.

    Args:
        calibration: batches of training rows, for `light.refit`.
        fit: makes the corrections of a `light.refit`.
    """
    started = time.perf_counter()
    watcher = work.watcher()
    watcher.look("after_estimation", model)
    light = cut(model, plan, work.config.light, calibration, fit)
    watcher.look("after_the_cut", light)
    light.light_task = task_facts(work.task)
    seconds = time.perf_counter() - started - watcher.seconds
    work.run.finish_stage("prune", seconds, lambda: light.save_pretrained(work.run.pruned), **watcher.facts())
    return light
