"""The check of the documentation's prose finds what the style guide forbids, and nothing else."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))

import style  # noqa: E402

SHORT = "The cut comes first."
LONG = "\n".join([" ".join(["word"] * 20)] * 2 + ["more"])


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        (f"{LONG}.", "1: a sentence of 41 words"),
        (f"{SHORT}\n\n- {SHORT}\n{LONG}.", "3: a sentence of 45 words"),
        ("What is cut is gone.", "1: a sentence begins with a noun clause"),
        (f"{SHORT} Who\ntrains it waits.", "1: a sentence begins with a noun clause"),
        (f"{SHORT} **Whatever** is cut is gone.", "1: a sentence begins with a noun clause"),
        (" ".join(["word"] * 20) + ".", "1: 20.0 words a sentence on average"),
        (f"# Title\n\n{'x' * 101}", "3: a line of 101 columns"),
    ],
)
def test_a_fault_is_found(page: str, fault: str) -> None:
    assert any(found.startswith(fault) for found in style.faults(page))


@pytest.mark.parametrize(
    "page",
    [
        f"```\n{LONG}. What is cut is gone. {'x' * 101}\n```",
        f"| {SHORT} {' word' * 41} | What is cut. |",
        f"    {'word ' * 41}",
        f"# What is cut {'x' * 101}",
        f"<!-- {LONG}\n{'x' * 101} -->",
        "What is cut? The heads.",
        f"[The cut]({'x' * 101}) comes first.",
        "- one\n- two\n- three, and " + "\n".join([" ".join(["word"] * 15)] * 2),
        "See `What is cut`. `what` is an option.",
    ],
)
def test_what_is_no_prose_is_no_fault(page: str) -> None:
    assert list(style.faults(page)) == []


def test_the_pages_that_are_done_are_in_plain_english() -> None:
    found = [f"{page.relative_to(ROOT)}:{fault}" for page in style.pages() for fault in style.faults(page.read_text())]
    assert style.pages() and not found, "\n".join(found)


def test_every_page_is_checked() -> None:
    """Those of the root, too; a generated page is made of docstrings."""
    written = {
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "benchmarks/README.md",
        ROOT / "examples/README.md",
        ROOT / "plugins/vllm/README.md",
    }
    assert written - set(style.pages()) == {ROOT / page for page in style.GENERATED}


def test_other_checks_get_the_prose_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Line by line, so that a fault that proselint finds has its line."""
    (tmp_path / "a.md").write_text(f"# Title\n\n```\ncode\n```\n[The cut](x.md) of `y`.\n\n{LONG}.\n")
    monkeypatch.setattr(style, "ROOT", tmp_path)
    monkeypatch.setattr(style, "pages", lambda: [tmp_path / "a.md"])
    assert style.main(["--prose", str(tmp_path / "prose")]) == 1
    assert (tmp_path / "prose/a.md").read_text().split("\n")[:6] == ["", "", "", "", "", "[The cut] of code."]


GONE = (
    "in the form of nobody",
    "sets rows aside, which these",
    "takes {rows} rows at once",
    "models that stay; beyond them",
    "who has asked for `auto`",
    "constant_answer",
    "untouched_base",
    "after_the_cut",
    "in_the_end",
    "as_it_is",
    "untaught",
    "doubt_of_tokens",
    "_ups_of",
    "_Forgiving",
    "def instead(",
    "def agreed(",
    "def widened(",
    "def remember(",
    "def _made(",
    "def _weigh(",
)
"""Words of a private vocabulary that names and messages had once."""
BRITISH = re.compile(r"quantis|labelled(?!by)|modelling|licence|colour|tokenis|normalis|initialis", re.IGNORECASE)


@pytest.mark.parametrize("words", GONE)
def test_words_of_our_own_are_gone(words: str) -> None:
    found = [path for path in (ROOT / "src").rglob("*.py") if words in path.read_text(encoding="utf-8")]
    assert not found


def test_names_are_spelt_as_the_libraries_spell_them() -> None:
    found = [path for path in (ROOT / "src").rglob("*.py") if BRITISH.search(path.read_text(encoding="utf-8"))]
    assert not found
