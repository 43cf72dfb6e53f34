"""`lightpeft reproduce`."""

from __future__ import annotations

import sys
from typing import Any

from lightpeft.app.cli.options import Option
from lightpeft.app.cli.screen import screen
from lightpeft.app.cli.verbs.verb import Verb
from lightpeft.errors import require


def _reproduce(grid: str, join: list[str] | None = None, out: str | None = None, **options: Any) -> None:
    from lightpeft.app.runs.reproduce import joined, reproduce, rich_table

    if join is not None:
        without = [f"--{name}" for name, value in options.items() if value is not None]
        require(not without, f"--join runs nothing, so that {', '.join(without)} would do nothing; leave it out")
    results = reproduce(grid, out, **options) if join is None else joined(grid, join, out)
    screen.print(rich_table(results, screen.width))
    if results.failures:
        sys.exit(1)


REPRODUCE = Verb(
    "reproduce",
    "Run a grid of models, tasks, methods and seeds, and write one table of it.",
    _reproduce,
    options=(
        Option("grid", "YAML file of the grid; paths in it are relative to this folder."),
        Option("--out", "Folder of the cells and tables (default: runs/<folder>/<file>)."),
        Option(
            "--only",
            "AXIS=NAME: run a part of the grid, as in method=lora seed=0; several of one axis are alternatives.",
            type=list[str],
            count="+",
        ),
        Option(
            "--join",
            "Run nothing: write one table from these results.json, or folders of them, of parts that ran elsewhere.",
            type=list[str],
            count="+",
        ),
        Option(
            "--devices",
            "Accelerators, or without any processes on the CPU, that each cell is spread over (default: all; 1).",
            type=int,
        ),
    ),
)
