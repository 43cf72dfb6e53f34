"""The page: facts, drawings and words put into one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightpeft.app.folders.run_folder import to_yaml
from lightpeft.app.runs.report import figures, telling
from lightpeft.app.runs.report.drawing import Drawing
from lightpeft.app.runs.report.facts import RunFacts, read_run
from lightpeft.app.runs.report.words import FILTERS
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
        "milestones": telling.milestones(run),
        "figures": _figures(run, measured[0] if measured else None),
        "found_budget": run.budget.summary() if run.budget is not None else None,
        "measured_rise": measured,
    }


def _figures(run: RunFacts, measured: float | None) -> dict[str, Any]:
    """The drawings of one run; None where there is nothing to draw."""
    names = ("heads", "neurons", "experts", "expert_neurons", "modules", "losses", "speeds", "rises", "budget")
    found: dict[str, Any] = dict.fromkeys(names)
    plan, curve = run.plan, run.curve
    if plan is not None:
        found["heads"] = figures.heads(plan)
        found["neurons"] = figures.neurons(plan) if any(spec.neurons for spec in plan.specs) else None
        routed = any(spec.experts for spec in plan.specs)
        found["experts"] = figures.experts(plan) if routed else None
        found["expert_neurons"] = figures.expert_neurons(plan) if routed else None
        found["modules"] = figures.modules(plan) if plan.dense_sites else None
    if run.losses:  # for large screens and paper, and for phones
        widths = (WIDE, figures.NARROW)
        found["losses"] = [figures.losses(run.losses, run.cut, telling.mark(run), width) for width in widths]
    if run.speeds is not None:
        found["speeds"] = figures.ratios([(row.name, row.ratio, row.quartiles) for row in run.speeds.rows])
    if curve is not None and curve["points"]:
        found["rises"] = figures.rises(curve, plan.removed_of_blocks if plan is not None else None)
    if run.budget is not None and run.budget.unmeasured is None:
        found["budget"] = figures.auto_budget(run.budget, measured)
    return found


def _beside(runs: Sequence[RunFacts]) -> dict[str, Any]:
    """What the template takes of several runs together."""
    reference = telling.reference_of(runs)
    metric = next((run.main_metric for run in (runs[reference], *runs) if run.main_metric), None)
    return {
        "reference": reference,
        "names": [run.name for run in runs],
        "metric": metric,
        "quality": None if metric is None else _qualities(runs, metric, runs[reference]),
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
