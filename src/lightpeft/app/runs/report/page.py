"""The HTML page of `lightpeft report`: facts and drawings in one file that needs no other."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightpeft.app.folders.stored_config import to_yaml
from lightpeft.app.runs.report import figures
from lightpeft.app.runs.report.facts import RunFacts, read_run
from lightpeft.app.runs.report.words import FILTERS, count, interval, metric_name, quality, share
from lightpeft.config import RunConfig
from lightpeft.console.progress import exact_duration as duration
from lightpeft.console.progress import in_bytes as size
from lightpeft.errors import require
from lightpeft.files import check_no_folder, explain_content_errors, read_text, write_text
from lightpeft.profiling.surroundings import versions
from lightpeft.saving.picture import UNITS

FULL_WIDTH_PIXELS = 960.0
"""Width in pixels of a full-width figure on a large screen."""
_GENERATOR = '<meta name="generator" content="lightpeft'
"""Start of every page that lightpeft writes, by which it may replace one."""
_PAGE_LIMIT = 64 * 2**20


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the page about one run, or a comparison of several.

    Args:
        folders: folders of runs, finished or not.
        output: HTML file to write; None: `report.html` in the folder or, of several runs, `comparison.html` in the
            first. An earlier page is replaced.

    Returns:
        Path of the file.

    Raises:
        LightPeftError: a folder is not that of a run, a file in it is damaged, or the output exists and is no page.
    """
    require(folders, "report: no run was given; give one or more run folders")
    paths = list(dict.fromkeys(Path(folder) for folder in folders))
    usual = paths[0] / ("report.html" if len(paths) == 1 else "comparison.html")
    file = usual if output is None else Path(output)
    _check_replaceable(file)
    text = page([read_run(path) for path in paths])
    write_text(file, text)
    return file


def _check_replaceable(file: Path) -> None:
    check_no_folder(file, "output")
    if file.exists():
        known = _GENERATOR in read_text(file, _PAGE_LIMIT)[:500]
        require(known, f"output {file} exists and is not a report of lightpeft; give another file")


def page(runs: Sequence[RunFacts]) -> str:
    """Return the page about some runs as HTML."""
    template = _environment().get_template("page.html.jinja")
    views = []
    for number, run in enumerate(runs, start=1):
        with explain_content_errors(run.folder):  # values of the right type may still be too large to draw
            views.append(_run_values(run, number))
    return template.render(
        runs=views,
        beside=_comparison(runs) if len(runs) > 1 else None,
        version=versions()["lightpeft"],
    )


@cache
def _environment() -> Environment:
    loader = PackageLoader("lightpeft.app.runs.report")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= FILTERS
    return made


# -- one run -------------------------------------------------------------------------------------------------------


def _run_values(run: RunFacts, number: int) -> dict[str, Any]:
    """Return the values of one run that the template shows."""
    again = ["lightpeft", "run", "--config", str(run.folder / "config.yaml"), "--output", f"{run.name}_again"]
    return {
        "number": number,
        "facts": run,
        "title": _title(run.config),
        "going_on": shlex.join(["lightpeft", "run", "--run", str(run.folder)]),
        "command": shlex.join(again),
        "settings": to_yaml(run.config),
        "metrics": _metrics(run),
        "milestone_metrics": _milestone_metrics(run),
        "figures": _figures(run),
        "curve": [] if run.curve is None else [_curve_cells(point) for point in run.curve["points"]],
    }


def _title(config: RunConfig) -> str:
    """Return the title of a run: base, task and method, shortened."""
    base = config.model.name.rstrip("/").rpartition("/")[2] or config.model.name
    rows = "/".join((config.data.path or config.data.train).rstrip("/").split("/")[-2:])
    task = f"{config.data.task} ({rows})" if rows else config.data.task
    method = f"{config.method} ({config.peft_type})" if config.method_spec.has_peft else config.method
    return f"{base}, {task}: {method}"


def _metrics(run: RunFacts) -> list[str]:
    """List the names of the metrics of a run, without counts."""
    counts = ("examples", "tokens")
    return [] if run.report is None else [name for name in run.report.metrics if name not in counts]


def _milestone_metrics(run: RunFacts) -> list[str]:
    """List the names of the metrics at the milestones of a run."""
    if run.report is None or run.report.milestones is None:
        return []
    return list(dict.fromkeys(name for values in run.report.milestones.metrics.values() for name in values))


def _curve_cells(point: dict[str, Any]) -> tuple[str, str, str]:
    """Return the cells of one budget of a curve: removed part of the blocks, rise of the loss, its interval."""
    low, high = point["interval"]
    return share(point["removed_of_blocks"]), f"{point['rise']:+.3f}", f"{low:+.3f} to {high:+.3f}"


def _figures(run: RunFacts) -> dict[str, Any]:
    """Draw the figures of one run for which there is data."""
    found: dict[str, Any] = {"stays": {}, "losses": None, "budget": None}
    plan = run.plan
    if plan is not None:
        there = [what for what, (dense, _) in UNITS.items() if any(map(dense, plan.specs))]
        found["stays"] = {what: figures.units(plan, what) for what in there}
        if plan.dense_sites:
            found["stays"]["PEFT modules and their ranks"] = figures.modules(plan)
    if run.losses:  # for large screens and paper, and for phones
        found["losses"] = [figures.losses(run.losses, run.cut, width) for width in (FULL_WIDTH_PIXELS, figures.NARROW)]
    if run.budget is not None and run.budget.probed:
        found["budget"] = figures.budget(run.budget)
    return found


# -- several -------------------------------------------------------------------------------------------------------


def _comparison(runs: Sequence[RunFacts]) -> dict[str, Any]:
    """Return the comparison of several runs that the template shows: a column per run, a row per measure."""
    names = dict.fromkeys(name for run in runs for name in _metrics(run))
    rows = {metric_name(name): [_quality(run, name) for run in runs] for name in names}
    measures: dict[str, tuple[Callable[[RunFacts], float | None], Callable[[float], str]]] = {
        "base parameters": (lambda run: run.report.parameters.base if run.report else None, count),
        "trained parameters": (lambda run: run.report.parameters.trained if run.report else None, count),
        "saved result": (lambda run: run.report.adapter_bytes if run.report else None, size),
        "training time": (lambda run: run.training_seconds, duration),
        "peak memory of training": (lambda run: run.peak_memory_bytes, size),
    }
    for name, (measure, form) in measures.items():
        rows[name] = ["" if (value := measure(run)) is None else form(value) for run in runs]
    return {
        "names": [run.name for run in runs],
        "rows": {name: cells for name, cells in rows.items() if any(cells)},
        "cautions": list(_cautions(runs)),
    }


def _quality(run: RunFacts, name: str) -> str:
    if run.report is None or name not in run.report.metrics:
        return ""
    ends = run.report.intervals.get(name)
    return quality(name, run.report.metrics[name]) + (f" ({interval(name, ends)})" if ends else "")


def _cautions(runs: Sequence[RunFacts]) -> Iterator[str]:
    """Yield reasons why numbers of the runs cannot be compared."""
    data = [run.config.data for run in runs]
    if len({(d.task, d.path, d.test or d.train, d.limit_test, d.test_fraction) for d in data}) > 1:
        yield "The runs were not all measured on the same test rows: their qualities cannot be compared."
    machines = [run.report.hardware for run in runs if run.report]
    if len({tuple(str(each.get(key)) for key in ("cpu", "gpu", "torch_threads")) for each in machines}) > 1:
        yield "The runs were made on different machines or numbers of threads: their times cannot be compared."
    taken = max((stage.others or 0.0 for run in runs for stage in run.stages), default=0.0)
    if taken:
        yield f"Other programs took {share(taken)} of the processor during a stage: the times cannot be compared."
