"""Pins what `pyproject.toml` asks for to the lowest version it allows, one requirement a line.

    python .ci/lowest.py pytest hypothesis > lowest.txt

Those of the package itself, and of the extra `dev` the ones that are named. Needs nothing but Python.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
BOUND = re.compile(r"(?P<name>[A-Za-z0-9._-]+)>=(?P<version>[0-9][0-9.]*)(,<[0-9.]+)?")


def lowest(project: dict[str, Any], more: list[str]) -> list[str]:
    """Every dependency, and those of `dev` that are named in `more`, as NAME==VERSION.

    Raises ValueError where a requirement is not of the form NAME>=VERSION, with <VERSION behind it or without, or `dev`
    lacks a name.
    """
    extra = {_bound(text)[0]: text for text in project["optional-dependencies"]["dev"]}
    lacking = [name for name in more if name not in extra]
    if lacking:
        raise ValueError(f"not in the extra dev: {', '.join(lacking)}")
    return ["==".join(_bound(text)) for text in (*project["dependencies"], *(extra[name] for name in more))]


def _bound(requirement: str) -> tuple[str, str]:
    found = BOUND.fullmatch(requirement)
    if found is None:
        raise ValueError(f"{requirement!r} is not of the form NAME>=VERSION: no lowest version is to be seen in it")
    return found["name"], found["version"]


if __name__ == "__main__":
    with PYPROJECT.open("rb") as file:
        sys.stdout.write("\n".join(lowest(tomllib.load(file)["project"], sys.argv[1:])) + "\n")
