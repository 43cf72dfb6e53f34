"""Code blocks of the documents."""

from __future__ import annotations

import re
from pathlib import Path

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(path.read_text(encoding="utf-8")) if kind == language]


def changed(program: str, diff: str) -> str:
    """A program with a diff applied: each run of its lines with "-" gives place to the lines with "+" behind it."""
    for gone, new in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", diff, re.MULTILINE):
        old = re.sub(r"^-", "", gone, flags=re.MULTILINE)
        assert program.count(old) == 1, f"the program has these lines {program.count(old)} times: {old}"
        program = program.replace(old, re.sub(r"^\+", "", new, flags=re.MULTILINE))
    return program
