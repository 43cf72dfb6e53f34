"""Tables of a plan, an estimation, a light model, or a run at any stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from lightpeft.app.cli.tables import facts_table, metrics_table, plan_table
from lightpeft.app.folders.forms import Found, LightAdapter
from lightpeft.app.folders.metrics_file import read_report
from lightpeft.app.folders.opening import find_folder, find_saved
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.folders.stored_config import is_run
from lightpeft.errors import LightPeftError, require
from lightpeft.files import explain_content_errors
from lightpeft.plans.estimation_record import RECORD, EstimationRecord
from lightpeft.plans.planning import make_plan
from lightpeft.plans.prune_plan import PrunePlan

_META_SHOWN = ("steps", "scored_steps", "scored_examples")
"""Entries of an estimation's `meta` that its table shows."""


def inspect(name: str | Path) -> list[Table]:
    """Return the tables that describe a file or folder.

    Args:
        name: a plan.json; the folder of a light adapter, a merged light model, an estimation or a run; or the name of
            such an adapter or model on the hub.

    Raises:
        LightPeftError: the file or folder is of another kind, is damaged, or has nothing to show yet.
    """
    path = Path(name)
    if not path.exists():
        found = find_saved(name)
        if found is None:
            raise LightPeftError(
                f"{name} does not exist; give a plan.json, a folder that lightpeft wrote, or a name on the hub"
            )
        return _model(found)
    if path.is_file():
        return [plan_table(PrunePlan.load(path))]
    if is_run(path):
        return _run(RunFolder.at(path))
    if (path / RECORD).is_file():
        return _estimation(path)
    return _model(find_folder(path))


def _run(run: RunFolder) -> list[Table]:
    """Return the tables for the result of the last finished stage of a run."""
    light = run.config.method_spec.prunes
    if light and run.has("train"):
        return _model(find_folder(run.adapter))
    if light and run.has("plan"):
        return [plan_table(PrunePlan.load(run.plan))]
    if light and run.has("estimate"):
        return _estimation(run.estimation)
    if run.has("evaluate"):
        report, title = read_report(run.metrics), f"run {run.path}: method {run.config.method}"
        return [metrics_table(report["metrics"], report.get("intervals", {}), title)]
    raise LightPeftError(f"{run.path}: the run has no result yet; continue it with lightpeft run --run {run.path}")


def _model(found: Found) -> list[Table]:
    """Return the tables of a light model: its base and metrics, and its plan; the base need not be available."""
    description = found.description
    instead = "give a light adapter, a merged light model, a plan.json or a run"
    require(description, f"{found.name} is a {found.kind}, which has no plan to show; {instead}")
    titles = {"id": "base model", "revision": "its revision", "architecture": "architecture", "dtype": "data type"}
    base = {title: description["base"][name] for name, title in titles.items()}
    base = {title: value for title, value in base.items() if value is not None}
    metrics = description["metrics"]
    require(
        isinstance(metrics, dict),
        f"{found.name} is damaged: metrics is {metrics!r}, not a mapping; copy or train it again",
    )
    measured = {"test rows" if name == "examples" else name: value for name, value in metrics.items()}
    facts = facts_table({**base, **_tokens(found), **measured}, f"{found.kind} {found.name}")
    with explain_content_errors(found.name):
        plan = PrunePlan.from_dict(description["plan"])
    return [facts, plan_table(plan)]


def _tokens(found: Found) -> dict[str, str]:
    """Return the number of tokens of a light adapter with a reduced vocabulary; nothing of others."""
    vocabulary = found.vocabulary if isinstance(found, LightAdapter) else None
    return {} if vocabulary is None else {"tokens": f"{len(vocabulary):,} of {vocabulary.size:,}"}


def _estimation(folder: Path) -> list[Table]:
    """Return the tables of an estimation: steps, sizes and, inside a run folder, the plan of the run's budget."""
    record = EstimationRecord.load(folder)
    found: dict[str, Any] = {name.replace("_", " "): record.meta[name] for name in _META_SHOWN if name in record.meta}
    found |= {
        "blocks": len(record.blocks),
        "PEFT modules": len(record.sites),
        "base parameters": record.base_parameters,
    }
    facts = facts_table(found, f"estimation {folder}")
    light = RunFolder.at(folder.parent).config.light if is_run(folder.parent) else None
    if light is None or light.is_auto:
        return [facts]
    plan = plan_table(make_plan(record, light))
    plan.title, plan.title_justify = "plan by the budget of the run", "left"
    return [facts, plan]
