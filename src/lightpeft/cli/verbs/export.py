"""`lightpeft export`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightpeft.cli.options import Option
from lightpeft.cli.screen import screen
from lightpeft.cli.verbs.predict import BASE, SWITCH_OPTIONS
from lightpeft.cli.verbs.verb import Verb


def _export(
    model: str, output: str, base: str | None = None, form: str = "merged", overwrite: bool = False, **switches: bool
) -> None:
    from lightpeft.saved.exporting import EXPORTS
    from lightpeft.saved.opening import find_light

    adapter = find_light(model, base, switches)
    reader = EXPORTS[form].write(adapter, Path(output), overwrite)
    screen.say(f"{adapter.plan.summary()}; {EXPORTS[form].what} is in {output}, for {reader} to load")


EXPORT = Verb(
    "export",
    "Give a light adapter away: as a whole pruned model, or as a PEFT adapter over the whole base.",
    _export,
    options=(
        Option("model", "Folder of a light adapter or of a finished run."),
        Option("output", "Where it goes: a new folder."),
        Option(
            "--form",
            "merged (usual): a whole pruned model that needs no base; peft: a plain PEFT adapter over the whole base, "
            "for whatever loads such.",
            type=Literal["merged", "peft"],
        ),
        BASE,
        Option("--overwrite", "Replace what was exported in this form there.", flag=True),
        *SWITCH_OPTIONS,
    ),
)
