"""The facts in the folder of a run, finished or not: plain data, read and checked once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightpeft.app.folders.metrics_file import RunReport, read_report
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.folders.stored_config import check_run
from lightpeft.budget.found import FoundBudget
from lightpeft.config import RunConfig
from lightpeft.config.validation import from_dict
from lightpeft.files import explain_content_errors, read_json
from lightpeft.plans.block_plan import block_parameters
from lightpeft.plans.prune_plan import PrunePlan

STAGES = {
    "teach": "Teacher",
    "depth": "Search for the depth",
    "estimate": "Estimation",
    "budget": "Search for the budget",
    "prune": "Cut",
    "train": "Fine-tuning",
    "widen": "Training at full width",
    "evaluate": "Evaluation",
}
"""Stage of a run in the log -> its title on the page."""
Size = tuple[str, float | None, float | None]
"""(name of the part, parameters before the cut, parameters after it); None: unknown."""
TRAINED = ("estimate", "train", "widen")
"""Stages with optimizer steps, in order."""


@dataclass(frozen=True)
class StageFacts:
    """Time, memory and steps of one stage of a run."""

    name: str
    done: bool
    seconds: float | None = None
    """Wall-clock seconds; None: unknown, or not done."""
    peak_memory_bytes: int | None = None
    steps: int | None = None
    """Optimizer steps."""
    resumed_at: int = 0
    """Step at which the last part of the stage began; time and memory are those of that part. 0: of all of it."""
    others: float | None = None
    """Part of all cores that other programs took meanwhile; None: too little to disturb, or unknown."""
    taken_from: str | None = None
    """Name of another run whose result is reused; None: the stage was run here."""

    @property
    def title(self) -> str:
        """Title of the stage on the page."""
        return STAGES[self.name]


@dataclass(frozen=True)
class Losses:
    """The training losses of one stage."""

    stage: str
    points: list[tuple[float, float]]
    """(step of the whole run, loss), ascending."""


@dataclass(frozen=True)
class RunFacts:
    """Settings, stages and results of one run."""

    folder: Path
    config: RunConfig
    stages: list[StageFacts]
    losses: list[Losses]
    cut: int | None
    """Step at which estimation ended and the model was cut, if anything was."""
    broken_losses: int
    """Lines of the log whose loss is NaN or infinite."""
    plan: PrunePlan | None
    report: RunReport | None
    """Content of metrics.json; None: the run was not evaluated yet."""
    sizes: list[Size]
    curve: dict[str, Any] | None
    """Content of curve.json; None: no curve was measured."""
    budget: FoundBudget | None
    """Budget that `light: auto` found; None: the budget was given."""

    @property
    def name(self) -> str:
        """Name of the run on the page: its folder."""
        return str(self.folder if self.folder.name else self.folder.resolve())

    @property
    def missing(self) -> list[StageFacts]:
        """Stages that are not done yet."""
        return [stage for stage in self.stages if not stage.done]

    @property
    def training_seconds(self) -> float | None:
        """Seconds of all stages but evaluation; None: one of them is unknown."""
        seconds = [stage.seconds for stage in self.stages if stage.name != "evaluate"]
        known = [each for each in seconds if each is not None]
        return sum(known) if known and len(known) == len(seconds) else None

    @property
    def peak_memory_bytes(self) -> int | None:
        """Largest peak memory of all training stages; None: unknown."""
        return max((stage.peak_memory_bytes for stage in self.stages if stage.peak_memory_bytes), default=None)


def read_run(folder: Path) -> RunFacts:
    """Read all facts of a run from its folder.

    Raises:
        LightPeftError: the folder is not that of a run, or a file in it is damaged.
    """
    check_run(folder)
    run = RunFolder.at(folder)
    raw = read_report(run.metrics) if run.has("evaluate") else None
    report = None if raw is None else RunReport.of(raw)
    plan = PrunePlan.load(run.plan) if run.config.method_spec.prunes and run.has("plan") else None
    stages = list(_read_stages(run, report))
    losses, broken = _read_losses(run.log_entries(), stages)
    return RunFacts(
        folder=folder,
        config=run.config,
        stages=stages,
        losses=losses,
        cut=next((stage.steps for stage in stages if stage.name == "estimate" and stage.done), None),
        broken_losses=broken,
        plan=plan,
        report=report,
        sizes=list(_count_parameters(plan, report)),
        curve=read_json(run.curve) if run.curve.is_file() else None,
        budget=_read_budget(raw, run.metrics) if raw is not None else None,
    )


def _read_stages(run: RunFolder, report: RunReport | None) -> Iterable[StageFacts]:
    method, logged = run.config.method_spec, run.finished_stages()
    light = run.config.light
    searched = light.is_auto and (run.has("budget") or not run.has("plan"))  # short runs have a plan without one
    before, after = ["depth"] if light.remove.depth == "auto" else [], ["budget"] if searched else []
    names = [*before, "estimate", *after, "prune", "train"] if method.prunes else ["train"]
    taught = ["teach"] if run.config.training.teacher is not None else []
    for name in [*taught, *names, *(["widen"] if run.keeps_full else []), "evaluate"]:
        told: dict[str, Any] = logged.get(name, {})
        if report is not None:
            told = {**told, "seconds": report.seconds.get(name, told.get("seconds")), **report.training.get(name, {})}
        known = ("seconds", "peak_memory_bytes", "steps", "resumed_at", "others", "taken_from")
        there = {key: told[key] for key in known if told.get(key) is not None}
        with explain_content_errors(run.log):
            yield from_dict(StageFacts, {"name": name, "done": run.has(name), **there}, f"{name}.")


MOST_POINTS = 400
"""Maximum number of points of a line; in a longer log each point is the mean of some lines."""


def _read_losses(entries: Iterable[Mapping[str, Any]], stages: Sequence[StageFacts]) -> tuple[list[Losses], int]:
    """Collect the losses by stage, and count those that are NaN or infinite; of a step logged twice, keep the last."""
    found: dict[str, dict[float, float]] = {stage: {} for stage in TRAINED}
    broken = 0
    for entry in entries:
        stage, step, loss = entry.get("stage"), entry.get("step"), entry.get("loss")
        if stage not in found or step is None or "loss" not in entry:
            continue
        if not isinstance(loss, (int, float)) or not math.isfinite(loss):
            broken += 1
        else:
            found[stage][step] = loss
    before = sum(stage.steps or 0 for stage in stages if stage.name in ("estimate", "train"))
    lines = []
    for name, losses in found.items():
        start = before if name == "widen" else 0  # the log counts steps at full width from 0
        points = sorted((start + step, loss) for step, loss in losses.items())
        if points:
            lines.append(Losses(name, _average(points, math.ceil(len(points) / MOST_POINTS))))
    return lines, broken


def _average(points: Sequence[tuple[float, float]], each: int) -> list[tuple[float, float]]:
    chunks = [points[start : start + each] for start in range(0, len(points), each)]
    return [(sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def _count_parameters(plan: PrunePlan | None, report: RunReport | None) -> Iterable[Size]:
    """Yield the parameters before the cut, by the plan, and after it, measured on the result if there is one."""
    measured = report.parameters if report is not None else None
    if plan is not None:
        blocks = sum(map(block_parameters, plan.specs))
        left = plan.base_parameters - plan.removed_parameters if measured is None else measured.base
        yield "base model", plan.base_parameters, left
        yield "blocks of the base", blocks, blocks - plan.removed_parameters
    elif measured is not None:
        yield "base model", None, measured.base
    if measured is not None and measured.trained is not None:
        yield "trained parameters", None, measured.trained


def _read_budget(report: Mapping[str, Any], path: Path) -> FoundBudget | None:
    told = report.get("budget")
    if not isinstance(told, dict):
        return None
    with explain_content_errors(path):
        names = {each.name for each in dataclasses.fields(FoundBudget)} - {"before"}
        found = from_dict(FoundBudget, {"before": {}} | {name: told[name] for name in names if name in told}, "budget.")
        return dataclasses.replace(found, before={point["blocks"]: point["rise"] for point in told.get("before", [])})
