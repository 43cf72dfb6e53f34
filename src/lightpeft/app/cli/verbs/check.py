"""`lightpeft check`."""

from __future__ import annotations

from typing import Any

from lightpeft.app.cli.options import Option
from lightpeft.app.cli.screen import screen
from lightpeft.app.cli.settings import run_config
from lightpeft.app.cli.verbs.verb import Verb


def _check(given: dict[str, Any], memory: float | None = None, json: str | None = None) -> None:
    from lightpeft.app.cli.tables import needs_table
    from lightpeft.app.runs.checking import check
    from lightpeft.app.runs.pipeline import prepare
    from lightpeft.errors import require
    from lightpeft.files import check_no_folder, write_json

    if memory is not None:
        require(0 < memory < 2**20, f"--memory: {memory:g} GiB is out of range; give a number above 0")
    check_no_folder(json, "json")
    available = None if memory is None else int(memory * 2**30)
    found = check(prepare(run_config(given), overwrite=True), available)
    screen.print(needs_table(found))
    for line in found.summary():
        screen.say(line)
    if json is not None:
        write_json(json, found.facts())


CHECK = Verb(
    "check",
    "Estimate the memory and computation of each stage of a run, before its model is loaded.",
    _check,
    options=(
        Option(
            "--memory",
            "Available memory in GiB (default: the memory of the accelerator or, without one, of this machine).",
            type=float,
        ),
        Option("--json", "JSON file for all numbers."),
    ),
    on_runs=True,
)
