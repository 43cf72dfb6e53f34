"""`lightpeft inspect`."""

from __future__ import annotations

from lightpeft.app.cli.options import Option
from lightpeft.app.cli.screen import screen
from lightpeft.app.cli.verbs.verb import Verb


def _inspect(path: str) -> None:
    from lightpeft.app.cli.inspecting import inspect

    for table in inspect(path):
        screen.print(table)


INSPECT = Verb(
    "inspect",
    "Print a plan, a light adapter, a merged light model or a run as a table, layer by layer.",
    _inspect,
    options=(
        Option(
            "path",
            "plan.json; the folder of an adapter, a merged light model, an estimation or a run; or a name on the hub.",
        ),
    ),
)
