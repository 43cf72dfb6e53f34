"""What tests of the benchmark scripts share: a short run, and a README that scripts write into."""

from __future__ import annotations

from pathlib import Path

import publishing
import pytest
from workbench import Workbench


def short_run(bench: Workbench) -> Path:
    """A configuration of eight steps, two of them estimation."""
    return bench.yaml("tiny", **{"training.epochs": 1, "light.preset": "paper"})


def readme_with(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A README.md that scripts write into instead of their own."""
    readme = folder / "README.md"
    readme.write_text(text)
    monkeypatch.setattr(publishing, "README", readme)
    return readme


def place(name: str) -> str:
    """Where a table goes."""
    return f"<!-- results: {name} -->\n<!-- /results: {name} -->\n"
