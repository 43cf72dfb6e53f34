"""`lightpeft reproduce`."""

from __future__ import annotations

import sys
from typing import Any

from lightpeft.cli.options import Option
from lightpeft.cli.screen import screen
from lightpeft.cli.verbs.verb import Verb


def _reproduce(grid: str, **options: Any) -> None:
    from lightpeft.runs.reproduce import reproduce, rich_table

    results = reproduce(grid, **options)
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
            "--devices",
            "Accelerators, or without any processes on the CPU, that each cell is spread over (default: all; 1).",
            type=int,
        ),
    ),
)
