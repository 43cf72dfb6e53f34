"""Pins what `pyproject.toml` asks for to the lowest version it allows, one requirement a line.

    python .ci/lowest.py pytest hypothesis > lowest.txt

Those of the package itself, and of the dependency groups the ones that are named. Needs nothing but Python.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
BOUND = re.compile(r"(?P<name>[A-Za-z0-9._-]+)>=(?P<version>[0-9][0-9.]*)(,<[0-9.]+)?")


def lowest(pyproject: dict[str, Any], more: list[str]) -> list[str]:
    """Every dependency, and those of the groups that are named in `more`, as NAME==VERSION.

    Raises ValueError where a requirement is not of the form NAME>=VERSION, with <VERSION behind it or without, or no
    group has a name.
    """
    groups = pyproject["dependency-groups"].values()
    grouped = {_name(text): text for group in groups for text in group if isinstance(text, str)}
    lacking = [name for name in more if name not in grouped]
    if lacking:
        raise ValueError(f"in no dependency group: {', '.join(lacking)}")
    asked = (*pyproject["project"]["dependencies"], *(grouped[name] for name in more))
    return ["==".join(_bound(text)) for text in asked]


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]


def _bound(requirement: str) -> tuple[str, str]:
    found = BOUND.fullmatch(requirement)
    if found is None:
        raise ValueError(f"{requirement!r} is not of the form NAME>=VERSION: no lowest version is to be seen in it")
    return found["name"], found["version"]


if __name__ == "__main__":
    with PYPROJECT.open("rb") as file:
        sys.stdout.write("\n".join(lowest(tomllib.load(file), sys.argv[1:])) + "\n")
