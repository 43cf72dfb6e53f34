"""What the folder of a run tells, however far the run has come: plain data, read and checked once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightpeft.app.folders.run_folder import RunFolder, RunReport, is_run, read_report
from lightpeft.budget.found import FoundBudget
from lightpeft.config import RunConfig
from lightpeft.config.validation import from_dict
from lightpeft.errors import require
from lightpeft.files import explain_content_errors, read_json
from lightpeft.plans.records import PrunePlan, block_parameters

STAGES = {
    "teach": "The teacher",
    "depth": "The depth",
    "estimate": "Estimation",
    "budget": "The budget",
    "prune": "The cut",
    "train": "Fine-tuning",
    "widen": "At full width",
    "evaluate": "Evaluation",
}
"""Stage of a run, as the log calls it -> how people do."""
Size = tuple[str, float | None, float | None]
"""(what, parameters before the cut, after it); None: not known, or nothing of the kind."""
TRAINED = ("estimate", "train", "widen")
"""Stages that take optimizer steps, in their order."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    name: str
    done: bool
    seconds: float | None = None
    """Wall-clock time; None: not known, or not done."""
    peak_memory_bytes: int | None = None
    steps: int | None = None
    """Optimizer steps."""
    resumed_at: int = 0
    """Step at which its last part began, which alone is timed; 0: all of it."""
    taken_from: str | None = None
    """Another run, whose result was taken."""

    @property
    def title(self) -> str:
        """Its name for people."""
        return STAGES[self.name]


@dataclass(frozen=True)
class Losses:
    """The training losses of one stage."""

    stage: str
    points: list[tuple[float, float]]
    """(step of the whole run, loss), ascending."""


@dataclass(frozen=True)
class RunFacts:
    """One run."""

    folder: Path
    config: RunConfig
    stages: list[Stage]
    losses: list[Losses]
    cut: int | None
    """Step at which estimation ended and the model was cut, if anything was."""
    broken_losses: int
    """Lines of the log whose loss is NaN or infinite."""
    plan: PrunePlan | None
    report: RunReport | None
    """What metrics.json says."""
    sizes: list[Size]
    curve: dict[str, Any] | None
    """What curve.json says."""
    budget: FoundBudget | None
    """What `light: auto` found."""

    @property
    def name(self) -> str:
        """What tells the run from others on the page."""
        return str(self.folder if self.folder.name else self.folder.resolve())

    @property
    def missing(self) -> list[Stage]:
        """Stages that are still to come."""
        return [stage for stage in self.stages if not stage.done]

    @property
    def training_seconds(self) -> float | None:
        """Seconds of all stages but evaluation; None where one is not known."""
        seconds = [stage.seconds for stage in self.stages if stage.name != "evaluate"]
        known = [each for each in seconds if each is not None]
        return sum(known) if known and len(known) == len(seconds) else None

    @property
    def peak_memory_bytes(self) -> int | None:
        """The largest peak of the stages that train."""
        return max((stage.peak_memory_bytes for stage in self.stages if stage.peak_memory_bytes), default=None)


def read_run(folder: Path) -> RunFacts:
    """All that is known of a run.

    Raises:
        LightPeftError: the folder is none of a run, or a file in it is not as it was written.
    """
    require(is_run(folder), f"{folder} is not the folder of a run: it has no config.yaml; give what `run` wrote to")
    run = RunFolder.at(folder)
    raw = read_report(run.metrics) if run.has("evaluate") else None
    report = None if raw is None else RunReport.of(raw)
    plan = PrunePlan.load(run.plan) if run.config.way.prunes and run.has("plan") else None
    stages = list(_stages(run, report))
    losses, broken = _losses(run.log_entries(), stages)
    return RunFacts(
        folder=folder,
        config=run.config,
        stages=stages,
        losses=losses,
        cut=next((stage.steps for stage in stages if stage.name == "estimate" and stage.done), None),
        broken_losses=broken,
        plan=plan,
        report=report,
        sizes=list(_sizes(plan, report)),
        curve=read_json(run.curve) if run.curve.is_file() else None,
        budget=_budget(raw, run.metrics) if raw is not None else None,
    )


def _stages(run: RunFolder, report: RunReport | None) -> Iterable[Stage]:
    way, logged = run.config.way, run.finished_stages()
    light = run.config.light
    before, after = ["depth"] if light.remove.depth == "auto" else [], ["budget"] if light.is_auto else []
    names = [*before, "estimate", *after, "prune", "train"] if way.prunes else ["train"]
    taught = ["teach"] if run.config.training.teacher is not None else []
    for name in [*taught, *names, *(["widen"] if run.keeps_full else []), "evaluate"]:
        told: dict[str, Any] = logged.get(name, {})
        if report is not None:
            told = {**told, "seconds": report.seconds.get(name, told.get("seconds")), **report.training.get(name, {})}
        yield Stage(
            name=name,
            done=run.has(name),
            seconds=told.get("seconds"),
            peak_memory_bytes=told.get("peak_memory_bytes"),
            steps=told.get("steps"),
            resumed_at=told.get("resumed_at") or 0,
            taken_from=told.get("taken_from"),
        )


MOST_POINTS = 400
"""Points of a line at most; of a longer log each is the mean of some lines."""


def _losses(entries: Iterable[Mapping[str, Any]], stages: Sequence[Stage]) -> tuple[list[Losses], int]:
    """Losses by stage, and how many are no number. What a resumed run logged twice counts once, as it was last."""
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
        start = before if name == "widen" else 0  # whose steps are counted anew
        points = sorted((start + step, loss) for step, loss in losses.items())
        if points:
            lines.append(Losses(name, _means(points, math.ceil(len(points) / MOST_POINTS))))
    return lines, broken


def _means(points: Sequence[tuple[float, float]], each: int) -> list[tuple[float, float]]:
    chunks = [points[start : start + each] for start in range(0, len(points), each)]
    return [(sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def _sizes(plan: PrunePlan | None, report: RunReport | None) -> Iterable[Size]:
    """What the plan says, and what was measured on the result."""
    measured = report.parameters if report is not None else {}
    if plan is not None:
        blocks = sum(map(block_parameters, plan.specs))
        yield "the base", plan.base_parameters, measured.get("base", plan.base_parameters - plan.removed_parameters)
        yield "its blocks", blocks, blocks - plan.removed_parameters
    elif "base" in measured:
        yield "the base", None, measured["base"]
    if "trained" in measured:
        yield "trained", None, measured["trained"]


def _budget(report: Mapping[str, Any], path: Path) -> FoundBudget | None:
    told = report.get("budget")
    if not isinstance(told, dict):
        return None
    with explain_content_errors(path):
        names = {each.name for each in dataclasses.fields(FoundBudget)} - {"before"}
        found = from_dict(FoundBudget, {"before": {}} | {name: told[name] for name in names if name in told}, "budget.")
        return dataclasses.replace(found, before={point["blocks"]: point["rise"] for point in told.get("before", [])})
