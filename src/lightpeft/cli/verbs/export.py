"""`lightpeft export`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightpeft.cli.options import Option
from lightpeft.cli.screen import screen
from lightpeft.cli.verbs.predict import BASE, SWITCH_OPTIONS
from lightpeft.cli.verbs.verb import Verb


def _export(
    model: str,
    output: str,
    base: str | None = None,
    form: str = "merged",
    dtype: str | None = None,
    overwrite: bool = False,
    **switches: bool,
) -> None:
    from lightpeft.saved.exporting import EXPORTS, export
    from lightpeft.saved.opening import find_light

    adapter = find_light(model, base, switches)
    reader = export(adapter, form, Path(output), overwrite=overwrite, dtype=dtype)
    screen.say(f"{adapter.plan.summary()}; {EXPORTS[form].what} is in {output}, for {reader} to load")


EXPORT = Verb(
    "export",
    "Give a light adapter away: as a whole pruned model, as a file for llama.cpp, or as a PEFT adapter of the base.",
    _export,
    options=(
        Option("model", "Folder of a light adapter or of a finished run, or a light adapter's name on the hub."),
        Option("output", "Where it goes: a new folder."),
        Option(
            "--form",
            "merged (usual): a whole pruned model that needs no base; peft: a plain PEFT adapter over the whole base, "
            "for whatever loads such; gguf: one file for llama.cpp, Ollama and their kin.",
            type=Literal["merged", "peft", "gguf"],
        ),
        Option(
            "--dtype",
            "Of the weights in the file (--form gguf; usual: as they are).",
            type=Literal["f32", "f16", "bf16", "q8_0"],
        ),
        BASE,
        Option("--overwrite", "Replace what was exported in this form there.", flag=True),
        *SWITCH_OPTIONS,
    ),
)
