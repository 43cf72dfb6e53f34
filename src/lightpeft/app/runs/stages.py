"""Write the results of a light run's stages into its folder; `pipeline` and the trainer both call these functions."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from peft import PeftModel

from lightpeft.app.evaluation.milestones import moment_behind
from lightpeft.app.folders.results import open_peft, save_peft
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.folders.stored_config import flat
from lightpeft.app.runs.workspace import Workspace
from lightpeft.app.tasks.loading import task_facts
from lightpeft.budget.found import FoundBudget
from lightpeft.config import READ_BY_PLANS, LightConfig
from lightpeft.errors import LightPeftError, require
from lightpeft.files import explain_content_errors, read_json, write_json
from lightpeft.machine import processes
from lightpeft.models.all_weights import too_few_digits
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.planning import make_plan
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.profiling.memory import MemoryMethod
from lightpeft.prune.depth import leave_out
from lightpeft.prune.learning import unlearned_warning
from lightpeft.prune.light_model import LightModel
from lightpeft.recipe.pruner import cut


@dataclass(frozen=True)
class StageCost:
    """Time and memory of a training stage, an entry of `training` in metrics.json."""

    seconds: float
    """Wall-clock seconds, storing a frozen prefix included; of a resumed stage, those of its last part."""
    samples_per_second: float
    """Training rows per second of all processes together, without the time of storing a frozen prefix."""
    peak_memory_bytes: int
    """Peak of training: on CUDA all allocated memory, elsewhere the growth over the loaded model."""
    peak_memory_method: MemoryMethod
    resumed_at: int
    """Step of the run at which the last part of the stage began; 0 for a stage that was not interrupted."""
    others: float | None = None
    """Part of all cores that other programs took meanwhile; None: too little to disturb, or unknown."""


def write_estimation(work: Workspace, model: PeftModel, record: EstimationRecord, cost: StageCost) -> None:
    """Write the scores and the trained weights of a finished estimation, and its line in the log."""
    run, steps, planned = work.run, record.meta["steps"], record.meta["planned_steps"]
    joined = bool(record.meta.get("base_joined"))
    if steps > planned:
        why = "the model had learned too little by then" + ("; in the last ones all weights trained" if joined else "")
        run.announce("estimate", f"estimation took {steps} steps instead of {planned}, because {why}")

    def save() -> None:
        save_peft(model, run.estimation / "adapter", with_base=joined)
        record.save(run.estimation)

    told: dict[str, Any] = {name: record.meta.get(name) for name in LEARNING}
    run.finish_stage("estimate", **asdict(cost), save=save, **told)


LEARNING = ("steps", "planned_steps", "learned")
"""Entries of an estimation's `meta` in log and report: steps taken, steps planned, and the part of the loss of an
answer by label frequencies that training took away by the last window (None: unknown)."""


def write_budget(run: RunFolder, found: FoundBudget) -> None:
    """Write the budget that `light: auto` found, and the seconds of the search."""
    facts = {**found.facts(), "settings": _budget_settings(run.config.light)}
    run.finish_stage("budget", found.seconds, lambda: write_json(run.budget, facts))


def _budget_settings(light: LightConfig) -> dict[str, Any]:
    """Return the settings that a budget depends on, beside those of the estimation, by dotted name."""
    return {name: value for name, value in flat(asdict(light)).items() if name in READ_BY_PLANS}


def found_budget(run: RunFolder) -> dict[str, Any] | None:
    """Return the budget that `light: auto` found with the run's settings; None: none yet.

    Raises:
        LightPeftError: the file is damaged.
    """
    if not run.has("budget"):
        return None
    found = read_json(run.budget)
    with explain_content_errors(run.budget):
        return found if found["settings"] == _budget_settings(run.config.light) else None


def light_with_budget(run: RunFolder) -> LightConfig:
    """Return the `light` settings of a run, with a number as budget where they say auto.

    Raises:
        LightPeftError: the budget was not found yet, or its file is damaged.
    """
    light = run.config.light
    if not light.is_auto:
        return light
    found = found_budget(run)
    if found is None:
        raise LightPeftError(f"{run.path} has no budget yet (light: auto); run lightpeft plan first")
    with explain_content_errors(run.budget):
        return light.with_blocks(float(found["blocks"]))


def write_plan(run: RunFolder) -> PrunePlan:
    """Make the plan (which heads, neurons, modules and ranks to keep) from scores and budget, and write it.

    Raises:
        LightPeftError: the run was pruned by another plan already, or no plan meets the budget.
    """
    result = make_plan(EstimationRecord.load(run.estimation), light_with_budget(run))
    if run.has("plan") and run.has("prune"):
        unchanged = PrunePlan.load(run.plan) == result
        require(unchanged, f"{run.path} was already pruned with another plan; set another output for this budget")
        return result
    if processes().is_main_process:
        result.save(run.plan)
    processes().wait_for_everyone()
    return result


def estimated_model(work: Workspace, record: EstimationRecord | PrunePlan) -> PeftModel:
    """Load the model as it was at the end of estimation, without the blocks that the record or plan leaves out."""
    model = open_peft(work.run.estimation / "adapter", work.dense_model().model, is_trainable=True)
    if record.left_out:
        leave_out(model, len(record.blocks))
    return model


def write_pruned(work: Workspace, model: PeftModel, plan: PrunePlan) -> LightModel:
    """Cut the model in place by the plan, measure it before and after the cut, and write it into the run folder."""
    started = time.perf_counter()
    watcher = work.watcher()
    if work.config.light.uses_scores:
        watcher.look("after_estimation", model)
        line = unlearned_warning(EstimationRecord.load(work.run.estimation)) if plan.removed_of_blocks else None
        if line is not None:
            watcher.warnings.append(line)
            work.run.announce("prune", f"warning: {line}")
    light = cut(model, plan)
    if plan.train == "all" and (line := too_few_digits(light)) is not None:
        watcher.warnings.append(line)
        work.run.announce("prune", f"warning: {line}")
    moment = moment_behind(plan)
    if work.config.light.uses_scores and moment is not None:
        watcher.look(moment, light)
    light.light_task = task_facts(work.task)
    seconds = time.perf_counter() - started - watcher.seconds
    work.run.finish_stage("prune", seconds, lambda: light.save_pretrained(work.run.pruned), **watcher.facts())
    return light
