"""`lightpeft reproduce`."""

from __future__ import annotations

import sys
from typing import Any

from lightpeft.app.cli.options import Option
from lightpeft.app.cli.screen import screen
from lightpeft.app.cli.verbs.verb import Verb
from lightpeft.config.validation import load_yaml
from lightpeft.errors import require


def _check(grid: str, **options: Any) -> None:
    load_yaml(grid)


def _reproduce(grid: str, join: list[str] | None = None, out: str | None = None, **options: Any) -> None:
    from lightpeft.app.runs.reproduce import join_results, reproduce, rich_table

    if join is not None:
        without = [f"--{name}" for name, value in options.items() if value is not None]
        require(not without, f"--join runs no cell, so {', '.join(without)} has no effect; leave it out")
    results = reproduce(grid, out, **options) if join is None else join_results(grid, join, out)
    screen.print(rich_table(results, screen.width))
    if results.failures:
        sys.exit(1)


REPRODUCE = Verb(
    "reproduce",
    "Run a grid of models, tasks, methods and seeds, and write one table of the results.",
    _reproduce,
    options=(
        Option("grid", "YAML file of the grid; paths in it are relative to this folder."),
        Option("--out", "Folder of the cells and tables (default: runs/<folder>/<file>)."),
        Option(
            "--only",
            "AXIS=NAME: run a part of the grid, as in method=lora seed=0; repeat an axis to run several of its names.",
            type=list[str],
            count="+",
        ),
        Option(
            "--join",
            "Run nothing: merge the results.json files (or their folders) of parts that ran elsewhere into one table.",
            type=list[str],
            count="+",
        ),
        Option(
            "--devices",
            "Accelerators per cell (default: all) or, without accelerators, CPU processes per cell (default: 1).",
            type=int,
        ),
    ),
    check=_check,
)
