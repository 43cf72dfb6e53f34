"""What `make test` runs, and what it leaves to `make test-all`, and to lanes of newer versions."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import Any

import pytest
import transformers
from peft.tuners.tuners_utils import BaseTuner

from lightpeft.models.families.registry import FAMILIES

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
FULL = os.environ.get("LIGHTPEFT_TESTS") == "all"
"""Whether all tests run (make test-all), and not one case of each."""
SAVES_OTHER_TYPES = hasattr(BaseTuner, "_remove_adapter_name_from_key")
needs_other_types = pytest.mark.skipif(not SAVES_OTHER_TYPES, reason="PEFT before 0.21 saves no bottleneck adapters")
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
