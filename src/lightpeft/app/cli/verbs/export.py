"""`lightpeft export`."""

from __future__ import annotations

from pathlib import Path

from lightpeft.app.cli.options import Option, one_of
from lightpeft.app.cli.screen import screen
from lightpeft.app.cli.verbs.predict import BASE, SWITCH_OPTIONS
from lightpeft.app.cli.verbs.verb import Verb
from lightpeft.app.exports.exporting import DTYPES, EXPORTS, export


def _export(
    model: str,
    output: str,
    base: str | None = None,
    form: str = "merged",
    dtype: str | None = None,
    overwrite: bool = False,
    **switches: bool,
) -> None:
    from lightpeft.app.folders.opening import find_light

    adapter = find_light(model, base, switches)
    written = export(adapter, form, Path(output), overwrite=overwrite, dtype=dtype)
    screen.say(f"{adapter.plan.summary()}; {output} holds {EXPORTS[form].what}, for {written} to load")


_DTYPES = "; ".join(f"{name}: {', '.join(form.dtypes)}" for name, form in EXPORTS.items() if form.dtypes)
EXPORT = Verb(
    "export",
    "Give a light adapter away: as a whole model, as a file for llama.cpp, ONNX Runtime or OpenVINO, or as a "
    "PEFT adapter of the base.",
    _export,
    options=(
        Option("model", "Folder of a light adapter or of a finished run, or a light adapter's name on the hub."),
        Option("output", "Where it goes: a new folder."),
        Option(
            "--form",
            f"{'; '.join(f'{name}: {form.what}' for name, form in EXPORTS.items())}.",
            type=one_of(EXPORTS),
            default="merged",
        ),
        Option("--dtype", f"Of the weights ({_DTYPES}; usual: as they are).", type=one_of(DTYPES)),
        BASE,
        Option("--overwrite", "Replace what was exported in this form there.", flag=True),
        *SWITCH_OPTIONS,
    ),
)
