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
    screen.say(f"wrote {EXPORTS[form].what} to {output}; load it with {written}; the plan {adapter.plan.summary()}")
    if dtype == "int8":
        _measure(adapter, form, Path(output), dtype)


def _measure(adapter: LightAdapter, form: str, folder: Path, dtype: str) -> None:
    """Print accuracy and speed of a quantized graph; a failure is one line, because the export itself succeeded."""
    from lightpeft.app.exports.graphs.measuring import measure_graph
    from lightpeft.app.exports.graphs.runtimes import RUNTIMES

    try:
        found = measure_graph(adapter, RUNTIMES[form], folder, dtype)
    except LightPeftError as error:
        screen.say(f"{folder}: the export was not measured: {error}")
        return
    for line in found.lines():
        screen.say(line)
    screen.warn(list(found.doubts()))


_DTYPES = "; ".join(f"{name}: {', '.join(form.dtypes)}" for name, form in EXPORTS.items() if form.dtypes)
EXPORT = Verb(
    "export",
    "Export a light adapter as a merged model, as a file for llama.cpp, ONNX Runtime or OpenVINO, or as a PEFT "
    "adapter of the base.",
    _export,
    options=(
        Option("model", "Folder of a light adapter or of a finished run, or a light adapter's name on the hub."),
        Option("output", "Output: a new folder."),
        Option(
            "--form",
            f"{'; '.join(f'{name}: {form.what}' for name, form in EXPORTS.items())}.",
            type=one_of(EXPORTS),
            default="merged",
        ),
        Option("--dtype", f"Data type of the exported weights ({_DTYPES}; default: unchanged).", type=one_of(DTYPES)),
        BASE,
        Option("--overwrite", "Replace an earlier export of this form in the output folder.", flag=True),
        *SWITCH_OPTIONS,
    ),
)
