"""Write docs/reference/settings.md: every setting with its type, its default and its docstring.

The page has what `lightpeft run --help-all` has, from the same place. `make docs` writes it anew; a test compares it
with what would be written.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from lightpeft.app.cli.options import shown_default, type_name
from lightpeft.app.cli.settings import Section, sections, sections_of
from lightpeft.config import TaskEntry

PAGE = Path(__file__).parent / "reference" / "settings.md"
HEAD = """# Settings

This page lists every setting of a run, with its type and default. In YAML, `training.epochs` is the key `epochs`
below `training`; on the command line it is `--training.epochs`. Keys of a mapping are set in the same way
(`--data.columns.text review`, `--peft.r 16`, `--trainer.optim sgd`). Defaults of `light` are those of LoRA on a
classifier; [defaults](training.md) explains how they depend on the run.

`docs/make_settings.py` generates this page from the classes.
"""


def page() -> str:
    """The whole page."""
    (own,) = sections_of("tasks.NAME", TaskEntry())
    tables = (line for part in (*sections(), own) for line in _table(part))
    return "\n".join([HEAD, *tables])


def _table(part: Section) -> Iterator[str]:
    whole = next((option for option in part.options if dataclasses.is_dataclass(option.type)), None)
    yield f"## {part.title}\n" if whole is None else f"## `{whole.target}`: {part.title[0].lower()}{part.title[1:]}\n"
    yield "| setting | type | default | description |"
    yield "|---|---|---|---|"
    for option in part.options:
        if dataclasses.is_dataclass(option.type):
            continue
        cells = (f"`{option.target}`", type_name(option.type), f"`{shown_default(option)}`", option.help)
        yield " | ".join(["", *(cell.replace("|", r"\|") for cell in cells), ""]).strip()
    yield ""


def main(arguments: list[str]) -> int:
    """Write the page, or with --check say whether it is as it would be written: 0, or 1."""
    if "--check" in arguments:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
