"""What is in a plan, an adapter, a merged model or a run, however far it has come: tables for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from lightpeft.cli.tables import facts_table, metrics_table, plan_table
from lightpeft.errors import LightPeftError, require
from lightpeft.plans.planning import make_plan
from lightpeft.plans.records import EstimationRecord, PrunePlan
from lightpeft.saved.light_adapter import DESCRIPTION, read_description
from lightpeft.saved.merging import MERGED, read_merged
from lightpeft.saved.run_folder import read_report, stored_config

_RECORD = "estimation.json"
_OF_META = ("steps", "scored_steps", "scored_examples")
"""What is shown of how an estimation was made."""
_CONFIG = "config.yaml"


def inspect(path: Path) -> list[Table]:
    """Tables of what is in a file or folder.

    Args:
        path: a plan.json, or the folder of an adapter, a merged light model, an estimation or a run.

    Raises:
        LightPeftError: it is none of that, or is damaged, or there is nothing to show yet.
    """
    require(path.exists(), f"{path} does not exist; give a plan.json, or a folder that lightpeft wrote")
    if path.is_file():
        return [plan_table(PrunePlan.load(path))]
    show = next((show for marker, show in _SHOWN.items() if (path / marker).is_file()), _light_adapter)
    return show(path)


def _light_adapter(folder: Path) -> list[Table]:
    return _light(read_description(folder), f"light adapter {folder}")


def _light(description: Mapping[str, Any], title: str) -> list[Table]:
    base = {name: description["base"][name] for name in ("id", "revision", "architecture", "dtype")}
    facts = facts_table({**base, **description["metrics"]}, title)
    return [facts, plan_table(PrunePlan.from_dict(description["plan"]))]


def _merged(folder: Path) -> list[Table]:
    return _light(read_merged(folder), f"merged light model {folder}")


def _record(folder: Path) -> list[Table]:
    """Of an estimation: how the scores were obtained, and the plan that its run would make of them."""
    record, config = EstimationRecord.load(folder), folder.parent / _CONFIG
    found: dict[str, Any] = {name: record.meta[name] for name in _OF_META if name in record.meta}
    found |= {
        "blocks": len(record.blocks),
        "PEFT modules": len(record.sites),
        "base parameters": record.base_parameters,
    }
    facts = facts_table(found, f"estimation {folder}")
    if not config.is_file():
        return [facts]
    plan = plan_table(make_plan(record, stored_config(folder.parent).light))
    plan.title, plan.title_justify = "the plan that the run's budget makes of it", "left"
    return [facts, plan]


def _measured(folder: Path) -> list[Table]:
    report = read_report(folder / "metrics.json")
    return [metrics_table(report["metrics"], report.get("intervals", {}), f"run {folder}: method {report['method']}")]


def _begun(folder: Path) -> list[Table]:
    raise LightPeftError(f"{folder} is a run without a result to show yet; go on with it: lightpeft run --run {folder}")


_SHOWN: dict[str, Callable[[Path], list[Table]]] = {
    f"adapter/{DESCRIPTION}": lambda folder: _light_adapter(folder / "adapter"),
    DESCRIPTION: _light_adapter,
    MERGED: _merged,
    "plan.json": lambda folder: [plan_table(PrunePlan.load(folder / "plan.json"))],
    _RECORD: _record,
    f"estimation/{_RECORD}": lambda folder: _record(folder / "estimation"),
    "metrics.json": _measured,
    _CONFIG: _begun,
}
"""File in a folder -> what is shown of the folder; the first that is there counts."""
