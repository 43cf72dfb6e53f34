"""`--write-readme`: numbers beside benchmarks/README.md, and tables in it.

Each table has its place between two HTML comments and is written by a script.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lightpeft.errors import LightPeftError, require
from lightpeft.files import read_text, write_json, write_text
from lightpeft.profiling.surroundings import hardware

README = Path(__file__).with_name("README.md")
LINES = 3
"""Depth of a file of numbers in lines."""


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add `--write-readme`."""
    about = "put the table into benchmarks/README.md, and all else beside it"
    parser.add_argument("--write-readme", action="store_true", help=about)


def command(script: str, arguments: Sequence[str] | None = None) -> str:
    """The command line that makes a script's results again, with the number of threads if the environment sets it.

    Args:
        arguments: of the script; None: those of this process.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    words = ["python", f"benchmarks/{script}.py", *(sys.argv[1:] if arguments is None else arguments)]
    return shlex.join([*([f"OMP_NUM_THREADS={threads}"] if threads else []), *words])


def report(
    script: str,
    arguments: Sequence[str] | None,
    out: Path | None,
    measure: Callable[[], Mapping[str, Any]],
    markdown: Callable[[Any], str],
) -> int:
    """Measure, print a table, and write everything into a file if one was asked for; 0, or 2 on bad input.

    Args:
        script, arguments: as for `command`, which is written beside what was found.
        measure: gives the content of the file, with that of the table under "results".
        markdown: makes the table.
    """
    try:
        found = measure()
        Console().print(markdown(found["results"]), markup=False, soft_wrap=True)
        if out is not None:
            write_json(out, {"command": command(script, arguments), "hardware": hardware(), **found})
    except LightPeftError as error:
        say(f"{script}: {error}")
        return 2
    return 0


def check_counts(given: argparse.Namespace, *names: str) -> None:
    """Raise `LightPeftError` if one of these options is below 1."""
    for name in names:
        require(getattr(given, name) >= 1, f"--{name} is {getattr(given, name)}; give at least 1")


def say(line: str) -> None:
    """A line on stderr."""
    Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)


def beside(name: str) -> Path:
    """A file or folder next to README.md."""
    return README.with_name(name)


def publish(place: str, text: str, numbers: str, results: dict[str, Any]) -> None:
    """Put `text` between `<!-- results: place -->` and `<!-- /results: place -->` of README.md, with a link to the file
    `numbers` beside it, which gets the results.

    Raises:
        LightPeftError: README.md has no such place.
    """
    start, end = f"<!-- results: {place} -->", f"<!-- /results: {place} -->"
    content = read_text(README)
    before, found, rest = content.partition(start)
    _, closed, after = rest.partition(end)
    require(found and closed, f"{README} has no place for these results; add the lines {start} and {end}")
    write_json(beside(numbers), results, LINES)
    every = f"Every number: [{numbers}]({numbers})."
    write_text(README, f"{before}{start}\n\n{text.strip()}\n\n{every}\n\n{end}{after}")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is aligned left and all others right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def spread_text(spread: Mapping[str, float]) -> str:
    """Median with quartiles."""
    return f"{spread['median']:.2f} ({spread['low']:.2f}-{spread['high']:.2f})"
