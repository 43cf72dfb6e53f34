"""What the stages of a light run leave in its folder, whoever runs them: one after another, or a trainer on its way."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from peft import PeftModel

from lightpeft.app.evaluation.milestones import moment_behind
from lightpeft.app.folders.results import open_peft, save_peft
from lightpeft.app.folders.run_folder import RunFolder, flat
from lightpeft.app.runs.workspace import Workspace
from lightpeft.app.tasks.loading import task_facts
from lightpeft.budget.found import FoundBudget
from lightpeft.config import READ_BY_PLANS, LightConfig
from lightpeft.errors import LightPeftError, require
from lightpeft.files import explain_content_errors, read_json, write_json
from lightpeft.machine import processes
from lightpeft.models.all_weights import too_few_digits
from lightpeft.plans.planning import make_plan
from lightpeft.plans.records import EstimationRecord, PrunePlan
from lightpeft.profiling.memory import MemoryMethod
from lightpeft.prune.depth import leave_out
from lightpeft.prune.learning import unlearned_warning
from lightpeft.prune.light_model import LightModel
from lightpeft.recipe.pruner import cut


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
    run, steps, planned = work.run, record.meta["steps"], record.meta["planned_steps"]
    if steps > planned:
        run.announce("estimate", f"estimation took {steps} steps instead of {planned}, to learn more of the task")

    def save() -> None:
        save_peft(model, run.estimation / "adapter")
        record.save(run.estimation)

    told: dict[str, Any] = {name: record.meta.get(name) for name in LEARNING}
    run.finish_stage("estimate", **asdict(cost), save=save, **told)


LEARNING = ("steps", "planned_steps", "learned")
"""What is told of an estimation: steps, steps if the task is learned in time, and the part of the loss of an answer by
the frequencies of labels that its last window took away (None: not known)."""


def leave_budget(run: RunFolder, found: FoundBudget) -> None:
    """What `light: auto` found, and the time that it took."""
    facts = {**found.facts(), "settings": _asked(run.config.light)}
    run.finish_stage("budget", found.seconds, lambda: write_json(run.budget, facts))


def _asked(light: LightConfig) -> dict[str, Any]:
    """What a budget hangs on, beside the estimation."""
    return {name: value for name, value in flat(asdict(light)).items() if name in READ_BY_PLANS}


def found_budget(run: RunFolder) -> dict[str, Any] | None:
    """What `light: auto` found by the run's settings; None: nothing yet.

    Raises:
        LightPeftError: the file is damaged.
    """
    if not run.has("budget"):
        return None
    found = read_json(run.budget)
    with explain_content_errors(run.budget):
        return found if found["settings"] == _asked(run.config.light) else None


def light_of(run: RunFolder) -> LightConfig:
    """The settings of a run, with a number for its budget.

    Raises:
        LightPeftError: that was not found yet, or its file is damaged.
    """
    light = run.config.light
    if not light.is_auto:
        return light
    found = found_budget(run)
    if found is None:
        raise LightPeftError(f"{run.path} has found no budget yet (light: auto); run lightpeft plan before this")
    with explain_content_errors(run.budget):
        return light.removing(float(found["blocks"]))


def leave_plan(run: RunFolder) -> PrunePlan:
    """Decide from the record and the budget which units stay."""
    result = make_plan(EstimationRecord.load(run.estimation), light_of(run))
    if run.has("plan") and run.has("prune"):
        unchanged = PrunePlan.load(run.plan) == result
        require(unchanged, f"{run.path} was pruned by another plan already; give another output for this budget")
        return result
    if processes().is_main_process:
        result.save(run.plan)
    processes().wait_for_everyone()
    return result


def estimated_model(work: Workspace, record: EstimationRecord | PrunePlan) -> PeftModel:
    """The model as estimation left it: with the blocks that its record, or a plan of that, knows."""
    model = open_peft(work.run.estimation / "adapter", work.dense_model().model, is_trainable=True)
    if record.left_out:
        leave_out(model, len(record.blocks))
    return model


def leave_pruned(work: Workspace, model: PeftModel, plan: PrunePlan) -> LightModel:
    """Cut the model as estimation left it, in place, look at it before and after if anything goes, and save it."""
    started = time.perf_counter()
    watcher = work.watcher()
    if work.config.light.chooses:
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
    if work.config.light.chooses and moment is not None:
        watcher.look(moment, light)
    light.light_task = task_facts(work.task)
    seconds = time.perf_counter() - started - watcher.seconds
    work.run.finish_stage("prune", seconds, lambda: light.save_pretrained(work.run.pruned), **watcher.facts())
    return light
