"""Make a version of what lies under "Unreleased", and say what a tag stands for.

    python .ci/release.py 0.2.0           # the version and today's date, into sources, CITATION.cff and CHANGELOG.md
    python .ci/release.py --tag v0.2.0    # whether the tree is that version
    python .ci/release.py --notes v0.2.0  # what the changelog says of it
    python .ci/release.py --steps 0.2.0   # what a maintainer does then

`make release VERSION=0.2.0` calls it. Needs nothing but Python. Bad input is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.compile(r"\d+\.\d+\.\d+((a|b|rc)\d+)?")
CHANGELOG, CITATION = "CHANGELOG.md", "CITATION.cff"
UNRELEASED = "## [Unreleased]\n"
PLACES = {
    "src/lightpeft/__init__.py": r'^__version__ = "(.+)"$',
    "plugins/vllm/pyproject.toml": r'^version = "(.+)"$',
    CITATION: r"^version: (.+)$",
}
"""File -> the one line that has the version."""
DATE = re.compile(r"^date-released: .+\n", re.MULTILINE)
STEPS = """
Left to do, with the accounts ("Release" in CONTRIBUTING.md):
    git diff                                  # the version, its date and nothing else
    git commit --all --message "Version {version}"
    git tag --sign v{version} --message "Version {version}"
    git push origin main v{version}           # starts .github/workflows/release.yml
    approve the environments release and release-vllm, once the workflow asks
"""


class ReleaseError(Exception):
    """A release that cannot be: one line."""


def prepare(root: Path, version: str, date: str) -> None:
    """Write the version and its date to all places; nothing is written where one of them is not as it should be.

    Raises:
        ReleaseError: it has another form or was released, nothing is under "Unreleased", or a place is missing.
    """
    if not VERSION.fullmatch(version):
        raise ReleaseError(f"VERSION={version} is no version; write one such as 0.2.0 or 0.2.0rc1")
    texts = {name: read(root, name) for name in (*PLACES, CHANGELOG)}
    if re.search(rf"^## \[{re.escape(version)}\]", texts[CHANGELOG], re.MULTILINE):
        raise ReleaseError(f"{CHANGELOG} has {version} already; take the next version, or undo that with git restore .")
    if not section(texts[CHANGELOG], "Unreleased"):
        raise ReleaseError(f'{CHANGELOG}: nothing is under "Unreleased"; say there what users can do now')
    texts[CITATION] = DATE.sub("", texts[CITATION])
    for name, pattern in PLACES.items():
        texts[name] = replaced(texts[name], pattern, version, name)
    texts[CITATION] = replaced(texts[CITATION], PLACES[CITATION], f"{version}\ndate-released: {date}", CITATION)
    texts[CHANGELOG] = texts[CHANGELOG].replace(UNRELEASED, f"{UNRELEASED}\n## [{version}] - {date}\n", 1)
    for name, text in texts.items():
        (root / name).write_text(text, encoding="utf-8")


def committed(root: Path) -> None:
    """Refuse a tree with changes: `git restore .`, which takes a version back, would take them with it.

    Raises:
        ReleaseError: a tracked file is changed.
    """
    words = ["git", "diff", "--name-only", "HEAD"]
    changed = subprocess.run(words, cwd=root, check=True, capture_output=True, text=True).stdout.splitlines()
    if changed:
        raise ReleaseError(f"{changed[0]} is changed and not committed; commit it, or put it aside with git stash")


def start(root: Path, version: str) -> None:
    """Write the version and today's date."""
    committed(root)
    prepare(root, version, f"{datetime.now(UTC):%Y-%m-%d}")


def check(root: Path, tag: str) -> None:
    """Refuse a tag that does not stand for this tree.

    Raises:
        ReleaseError: it is not "v" and the version that all places and the changelog have.
    """
    for name, pattern in PLACES.items():
        found = only(read(root, name), pattern, name)
        if tag != f"v{found[1]}":
            raise ReleaseError(f"the tag {tag} is not the version of {name}, v{found[1]}; make release writes it")
    notes(root, tag)


def notes(root: Path, tag: str) -> str:
    """The text of the changelog for the version of a tag.

    Raises:
        ReleaseError: it has nothing of it.
    """
    text = section(read(root, CHANGELOG), tag.removeprefix("v"))
    if not text:
        raise ReleaseError(f"{CHANGELOG} says nothing of {tag}; make release writes its heading")
    return text


def section(changelog: str, version: str) -> str:
    """The text under the heading of a version; "" if there is none."""
    found = re.search(rf"^## \[{re.escape(version)}\][^\n]*\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def read(root: Path, name: str) -> str:
    """The text of a file of the repository."""
    try:
        return (root / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ReleaseError(f"{name} is missing; a release needs it") from None


def only(text: str, pattern: str, name: str) -> re.Match[str]:
    """The only match of a pattern in the text of a file."""
    found = list(re.finditer(pattern, text, re.MULTILINE))
    if len(found) != 1:
        raise ReleaseError(f"{name} has {len(found)} lines of the form {pattern}; it needs one")
    return found[0]


def replaced(text: str, pattern: str, value: str, name: str) -> str:
    """The text with a value where the group of the pattern is."""
    found = only(text, pattern, name)
    return text[: found.start(1)] + value + text[found.end(1) :]


def main(arguments: list[str]) -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("version", nargs="?", help="write this version, and today's date")
    parser.add_argument("--tag", help="check that this tag stands for the tree")
    parser.add_argument("--notes", metavar="TAG", help="show what the changelog says of a tag")
    parser.add_argument("--steps", metavar="VERSION", help="show what a maintainer does then")
    asked = parser.parse_args(arguments)
    does: dict[str, Callable[[str], str | None]] = {
        "version": lambda version: start(ROOT, version),
        "tag": lambda tag: check(ROOT, tag),
        "notes": lambda tag: notes(ROOT, tag),
        "steps": lambda version: STEPS.format(version=version),
    }
    given = {name: value for name, value in vars(asked).items() if value is not None}
    if len(given) != 1:
        raise ReleaseError("say one thing: a version, --tag, --notes or --steps (make release VERSION=0.2.0)")
    for name, value in given.items():
        said = does[name](value)
        sys.stdout.write(f"{said}\n" if said else "")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ReleaseError as error:
        sys.stderr.write(f"release: {error}\n")
        sys.exit(2)
