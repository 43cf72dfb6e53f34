"""`lightpeft export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightpeft.app.cli.options import Option, one_of
from lightpeft.app.cli.screen import screen
from lightpeft.app.cli.verbs.predict import BASE, SWITCH_OPTIONS
from lightpeft.app.cli.verbs.verb import Verb
from lightpeft.app.exports.exporting import DTYPES, EXPORTS, export
from lightpeft.errors import LightPeftError

if TYPE_CHECKING:
    from lightpeft.app.folders.forms import LightAdapter


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
    if dtype == "int8":
        _measure(adapter, form, Path(output), dtype)


def _measure(adapter: LightAdapter, form: str, folder: Path, dtype: str) -> None:
    """Say what a graph in few bits is worth: what was exported is there, whether or not it can be measured."""
    from lightpeft.app.exports.graphs.measuring import measure_graph
    from lightpeft.app.exports.graphs.runtimes import RUNTIMES

    try:
        found = measure_graph(adapter, RUNTIMES[form], folder, dtype)
    except LightPeftError as error:
        screen.say(f"nothing was measured of it: {error}")
        return
    for line in found.lines():
        screen.say(line)
    screen.warn(list(found.doubts()))


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
