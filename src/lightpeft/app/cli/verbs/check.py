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
    from lightpeft.files import write_json

    if memory is not None:
        require(0 < memory < 2**20, f"--memory is {memory:g}; give GiB, above 0")
    available = None if memory is None else int(memory * 2**30)
    found = check(prepare(run_config(given), overwrite=True), available)
    screen.print(needs_table(found))
    for line in found.summary():
        screen.say(line)
    if json is not None:
        write_json(json, found.facts())


CHECK = Verb(
    "check",
    "What a run would need, before its model is loaded: memory by stage, and computation.",
    _check,
    options=(
        Option("--memory", "GiB that it may take (default: what this machine, or its accelerator, has).", type=float),
        Option("--json", "File for every number."),
    ),
    on_runs=True,
)
