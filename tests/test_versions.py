"""The lanes of versions: the lowest that pyproject.toml allows are read off it, and their tests are there."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from lightpeft.compat.missing import TESTED_RELEASES

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
lowest = runpy.run_path(str(ROOT / ".ci" / "lowest.py"))["lowest"]


def of_makefile(name: str) -> list[str]:
    """The words of a variable of the Makefile."""
    return " ".join(re.findall(rf"^{name} [+:]?= (.*)$", MAKEFILE, re.MULTILINE)).split()


def test_the_lowest_versions_are_the_bounds() -> None:
    tools = of_makefile("TOOLS")
    pins = [Requirement(text) for text in lowest(PYPROJECT, tools)]
    of_tests = [each for each in map(Requirement, PYPROJECT["dependency-groups"]["test"]) if each.name in tools]
    asked = {each.name: each for each in (*map(Requirement, PROJECT["dependencies"]), *of_tests)}
    assert sorted(pin.name for pin in pins) == sorted(asked)
    assert {"torch", "transformers", "pytest"} <= asked.keys()
    for pin in pins:
        (exact,) = pin.specifier
        (bound,) = (each for each in asked[pin.name].specifier if each.operator == ">=")
        assert exact.operator == "==" and Version(exact.version) == Version(bound.version)


def test_the_versions_that_were_tried_begin_at_the_bounds() -> None:
    """And error lines name them."""
    asked = {each.name: each.specifier for each in map(Requirement, PROJECT["dependencies"])}
    for name, versions in TESTED_RELEASES.items():
        first, last = versions.split(" to ")
        assert f">={first}" in str(asked[name]) and last in asked[name]


@pytest.mark.parametrize("requirement", ["torch", "torch>2", "torch<3,>=2", "torch~=2.9", "torch>=2.9; extra == 'x'"])
def test_a_requirement_without_a_lowest_version(requirement: str) -> None:
    project: dict[str, Any] = {"project": {"dependencies": [requirement]}, "dependency-groups": {"test": []}}
    with pytest.raises(ValueError, match="no lowest version is to be seen in it"):
        lowest(project, [])


def test_tools_that_nobody_asks_for() -> None:
    with pytest.raises(ValueError, match="in no dependency group: pytest-none"):
        lowest(PYPROJECT, ["pytest", "pytest-none"])


def test_the_tests_of_the_lanes_are_there() -> None:
    core = of_makefile("CORE")
    assert len(core) == len(set(core)) > 30
    missing = [name for name in core if not (ROOT / "tests" / f"test_{name}.py").exists()]
    assert not missing
