"""A README that benchmark scripts write into in place of their own."""

from __future__ import annotations

from pathlib import Path

import publishing
import pytest


def readme_with(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A README.md that scripts write into instead of their own."""
    readme = folder / "README.md"
    readme.write_text(text)
    monkeypatch.setattr(publishing, "README", readme)
    return readme


def place(name: str) -> str:
    """Where a table goes."""
    return f"<!-- results: {name} -->\n<!-- /results: {name} -->\n"
