"""What `make test` runs, what it leaves to `make test-all`, and what lanes of older versions leave out."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from importlib.metadata import version
from typing import Any

import pytest
import transformers
from packaging.version import Version

from lightpeft.models.families.family_table import FAMILIES

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
FULL = os.environ.get("LIGHTPEFT_TESTS") == "all"
"""Whether all tests run (make test-all), and not one case of each."""


def older(library: str, release: str) -> bool:
    """Whether a library is older than this release."""
    return Version(version(library)) < Version(release)


def needs(library: str, release: str, why: str) -> pytest.MarkDecorator:
    """Of a test that lanes of older versions leave out.

    Args:
        release: the first one of the library that the test is for.
        why: what is otherwise before it.
    """
    reason = f"needs {library} {release}, here is {version(library)}: {why}"
    return pytest.mark.skipif(older(library, release), reason=reason)


needs_other_types = needs("peft", "0.21", "older ones save no bottleneck adapters")
thorough = pytest.mark.thorough
"""Of a test that repeats what another one tells, or takes long for what it tells: `make test` leaves it out."""


def telling(argument: str | tuple[str, ...], cases: Iterable[Any], chosen: Collection[Any]) -> pytest.MarkDecorator:
    """A test with all cases, of which `make test` runs those that are chosen."""
    marked = []
    for case in cases:
        values = case if isinstance(argument, tuple) else (case,)
        name = "-".join(values) if all(isinstance(value, str) for value in values) else None
        marked.append(pytest.param(*values, marks=() if case in chosen else thorough, id=name))
    return pytest.mark.parametrize(argument, marked)


def too_new(name: str) -> bool:
    """Whether the tiny model of this name is of a family that came with a newer transformers than is here."""
    family = FAMILIES.get(name.partition("-")[0])
    return family is not None and family.since > RELEASE


def needs_family(name: str) -> pytest.MarkDecorator:
    """Of a test with the tiny model of this name."""
    return pytest.mark.skipif(too_new(name), reason=f"{name} needs a newer transformers")
