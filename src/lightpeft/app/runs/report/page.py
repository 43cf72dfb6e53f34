"""The page: facts, drawings and words put into one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightpeft.app.folders.run_folder import to_yaml
from lightpeft.app.runs.report import figures, telling
from lightpeft.app.runs.report.drawing import BLUE, QUIET, Drawing
from lightpeft.app.runs.report.facts import RunFacts, Stage, read_run
from lightpeft.app.runs.report.words import FILTERS, duration, size
from lightpeft.errors import require
from lightpeft.files import read_text, understandable, write_text
from lightpeft.profiling.surroundings import versions

WIDE = 960.0
"""Pixels that a figure over the whole width has on a large screen."""
_GENERATOR = '<meta name="generator" content="lightpeft'
"""By which a page that was written here is known."""
_PAGE_LIMIT = 64 * 2**20


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the page about one run, or about several beside one another.

    Args:
        folders: of runs, however far they have come.
        output: the file; None: `report.html` in the first folder. A page of earlier is replaced.

    Returns:
        The file.

    Raises:
        LightPeftError: a folder is none of a run, a file in it is damaged, or the output is something else.
    """
    require(folders, "give the folder of a run, or of several")
    paths = list(dict.fromkeys(Path(folder) for folder in folders))
    file = paths[0] / "report.html" if output is None else Path(output)
    _check_replaceable(file)
    text = page([read_run(path) for path in paths])
    write_text(file, text)
    return file


def _check_replaceable(file: Path) -> None:
    require(not file.is_dir(), f"output {file} is a folder; give a file")
    if file.exists():
        known = _GENERATOR in read_text(file, _PAGE_LIMIT)[:500]
        require(known, f"output {file} is there, and no report; give another file")


def page(runs: Sequence[RunFacts]) -> str:
    """The page about some runs, as HTML."""
    template = _environment().get_template("page.html.jinja")
    views = []
    for number, run in enumerate(runs, start=1):
        with understandable(run.folder):  # what is typed and finite may still be beyond what can be drawn
            views.append(_view(run, number, runs))
    return template.render(
        runs=views,
        beside=_beside(runs) if len(runs) > 1 else None,
        version=versions()["lightpeft"],
    )


@cache
def _environment() -> Environment:
    loader = PackageLoader("lightpeft.app.runs.report")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= FILTERS
    return made


@dataclass(frozen=True)
class Both:
    """A figure drawn twice: for large screens and paper, and for phones. The page shows one of them."""

    wide: Drawing
    narrow: Drawing

    @classmethod
    def of(cls, draw: Callable[[float], Drawing]) -> Both:
        """What is drawn for any width."""
        return cls(draw(WIDE), draw(figures.NARROW))


def _view(run: RunFacts, number: int, runs: Sequence[RunFacts]) -> dict[str, Any]:
    """What the template takes of one run."""
    measured = telling.measured_rise(run, runs) if run.budget is not None else None
    return {
        "number": number,
        "facts": run,
        "model": telling.model_name(run.config),
        "task": telling.task_name(run.config),
        "method": telling.method_name(run.config),
        "outcome": telling.outcome(run),
        "going_on": telling.going_on(run),
        "command": telling.command(run),
        "settings": to_yaml(run.config),
        "hardware": telling.hardware(run),
        "metrics": telling.metrics(run),
        "figures": _figures(run, measured[0] if measured else None),
        "found_budget": run.budget.summary() if run.budget is not None else None,
        "measured_rise": measured,
    }


@dataclass(frozen=True)
class Figures:
    """The drawings of one run; None where there is nothing to draw."""

    heads: Drawing | None = None
    neurons: Drawing | None = None
    experts: Drawing | None = None
    expert_neurons: Drawing | None = None
    modules: Drawing | None = None
    losses: Both | None = None
    course: Mapping[str, Drawing] = field(default_factory=dict)
    seconds: Drawing | None = None
    memory: Drawing | None = None
    speeds: Drawing | None = None
    rises: Drawing | None = None
    step_times: Drawing | None = None
    budget: Drawing | None = None


def _figures(run: RunFacts, measured: float | None) -> Figures:
    found: dict[str, Any] = {}
    plan, curve = run.plan, run.curve
    if plan is not None:
        found["heads"] = figures.heads(plan)
        found["neurons"] = figures.neurons(plan) if any(spec.neurons for spec in plan.specs) else None
        routed = any(spec.experts for spec in plan.specs)
        found["experts"] = figures.experts(plan) if routed else None
        found["expert_neurons"] = figures.expert_neurons(plan) if routed else None
        found["modules"] = figures.modules(plan) if plan.dense_sites else None
    if run.losses:
        found["losses"] = Both.of(lambda width: figures.losses(run.losses, run.cut, telling.mark(run), width))
    if run.report is not None:
        moments = run.report.milestones.metrics
        names = dict.fromkeys(name for values in moments.values() for name in values)
        told = [name for name in names if sum(name in values for values in moments.values()) > 1]
        found["course"] = {name: figures.course(moments, name) for name in told}
    found["seconds"] = _by_stage([(stage, stage.seconds) for stage in run.stages], "Time by stage", duration)
    found["memory"] = _by_stage(
        [(stage, stage.peak_memory_bytes) for stage in run.stages], "Peak memory by stage", size
    )
    if run.speeds is not None:
        found["speeds"] = figures.ratios([(row.name, row.ratio, row.quartiles) for row in run.speeds.rows])
    chosen = plan.removed_of_blocks if plan is not None else None
    if curve is not None and curve["points"]:
        found["rises"], found["step_times"] = figures.rises(curve, chosen), figures.step_times(curve, chosen)
    if run.budget is not None and run.budget.unmeasured is None:
        found["budget"] = figures.auto_budget(run.budget, measured)
    return Figures(**found)


def _by_stage(
    values: Sequence[tuple[Stage, float | None]], label: str, words: Callable[[float], str]
) -> Drawing | None:
    """A bar a stage, of those whose value is known."""
    rows = [
        (stage.title, [(figures.COLOURS.get(stage.name, QUIET), value)], words(value))
        for stage, value in values
        if value is not None
    ]
    return figures.bars(rows, label, words) if rows else None


def _beside(runs: Sequence[RunFacts]) -> dict[str, Any]:
    """What the template takes of several runs together."""
    reference = telling.reference_of(runs)
    metric = next((run.main_metric for run in (runs[reference], *runs) if run.main_metric), None)
    timed = [run for run in runs if run.training_seconds is not None]
    times = [(run.name, _parts(run), duration(run.training_seconds or 0)) for run in timed]
    memory = [(run.name, [(BLUE, peak)], size(peak)) for run in runs if (peak := run.peak_memory_bytes)]
    return {
        "reference": reference,
        "names": [run.name for run in runs],
        "metric": metric,
        "quality": None if metric is None else _qualities(runs, metric, runs[reference]),
        "times": figures.bars(times, "Time by run and stage", duration) if times else None,
        "widened": any(stage.name == "widen" for run in timed for stage in run.stages),
        "memory": figures.bars(memory, "Peak memory by run", size) if memory else None,
        "rows": telling.beside(runs, reference),
        "settings": telling.differing_settings(runs),
        "cautions": list(telling.cautions(runs)),
    }


def _qualities(runs: Sequence[RunFacts], metric: str, reference: RunFacts) -> Drawing:
    """A metric of all runs that have it."""
    told = [(run, run.report) for run in runs if run.report is not None and metric in run.report.metrics]
    rows = [(run.name, report.metrics[metric], report.intervals.get(metric)) for run, report in told]
    at = next((place for place, (run, _) in enumerate(told) if run is reference), None)
    return figures.intervals(rows, metric, at)


def _parts(run: RunFacts) -> list[tuple[str, float]]:
    """The seconds of its stages but evaluation, each with its colour."""
    stages = [(stage.name, stage.seconds) for stage in run.stages if stage.name != "evaluate"]
    return [(figures.COLOURS.get(name, QUIET), seconds) for name, seconds in stages if seconds is not None]
