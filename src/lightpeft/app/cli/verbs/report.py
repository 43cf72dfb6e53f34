"""`lightpeft report`."""

from __future__ import annotations

from pathlib import Path

from lightpeft.app.cli.options import Option
from lightpeft.app.cli.screen import screen
from lightpeft.app.cli.verbs.verb import Verb
from lightpeft.app.folders.stored_config import check_run


def _check(runs: list[str], output: str | None = None) -> None:
    for run in runs:
        check_run(Path(run))


def _report(runs: list[str], output: str | None = None) -> None:
    from lightpeft.app.runs.report.page import write_report

    screen.say(f"wrote the report to {write_report(runs, output)}")


REPORT = Verb(
    "report",
    "Write one HTML page about a run, or one that compares several, finished or not.",
    _report,
    options=(
        Option(
            "runs",
            "Folders of runs.",
            list[str],
            count="+",
        ),
        Option(
            "--output",
            "HTML file to write (default: report.html in the folder; of several, comparison.html in the first).",
        ),
    ),
    check=_check,
)
