"""The description on the package index is README, whose relative links lead into the repository there."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
REPOSITORY = "https://github.com/lightpeft/lightpeft"
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)")


def description(readme: str, version: str) -> str:
    """README with absolute links, to the files of this version; pictures are linked as such."""
    return LINK.sub(
        lambda link: f"{link[1]}[{link[2]}]({REPOSITORY}/{'raw' if link[1] else 'blob'}/v{version}/{link[3]})", readme
    )


def version() -> str:
    """The version in `lightpeft/__init__.py`, which is read and not imported: its dependencies are not here."""
    (found,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "src/lightpeft/__init__.py").read_text(), re.MULTILINE)
    return str(found)


if __name__ == "__main__":
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(long_description=description(readme, version()), long_description_content_type="text/markdown")
