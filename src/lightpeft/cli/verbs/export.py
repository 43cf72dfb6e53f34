"""`lightpeft export`."""

from __future__ import annotations

from lightpeft.cli.options import Option
from lightpeft.cli.screen import screen
from lightpeft.cli.verbs.predict import BASE, SWITCH_OPTIONS
from lightpeft.cli.verbs.verb import Verb


def _export(model: str, output: str, base: str | None = None, overwrite: bool = False, **switches: bool) -> None:
    from lightpeft.saved.merging import save_merged
    from lightpeft.saved.opening import find_model, open_light

    found = find_model(model, base, switches)
    light = open_light(found)
    native = save_merged(light, output, found.tokenizer(), overwrite=overwrite)
    reader = "transformers" if native else "lightpeft.load_merged"
    screen.say(f"{light.light_plan.summary()}; the model is in {output}, for {reader} to load")


EXPORT = Verb(
    "export",
    "Merge a light adapter into its pruned base: a whole model in a folder of its own.",
    _export,
    options=(
        Option("model", "Folder of a light adapter or of a finished run."),
        Option("output", "Where the whole model goes: a new folder."),
        BASE,
        Option("--overwrite", "Replace a merged light model that is there.", flag=True),
        *SWITCH_OPTIONS,
    ),
)
