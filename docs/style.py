"""Check the prose of the documentation: how long sentences and lines are, and how sentences begin.

`make lint` runs it, and proselint over the same prose. CONTRIBUTING.md has the style guide. Code, tables, headings and
comments are not prose; nor is a page that a script generates.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DONE = (
    "README.md",
    "CHANGELOG.md",
    "CODE_OF_CONDUCT.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/**/*.md",
    "benchmarks/README.md",
    "examples/README.md",
    "plugins/vllm/README.md",
)
"""Pages in plain English, as patterns. Add a page here when its prose is edited."""
GENERATED = ("docs/reference/settings.md",)

LONGEST_SENTENCE = 40
"""Words."""
AVERAGE_SENTENCE = 20
"""Words, over a page: the average stays below."""
WIDTH = 100
"""Columns of a line, the targets of links apart."""

NOT_PROSE = re.compile(r"^```.*?^```$|<!-- results: .*?<!-- /results: .*?-->|<!--.*?-->", re.MULTILINE | re.DOTALL)
OTHER = ("|", "#", ":::", "![")
"""How lines of tables, headings, references and pictures begin."""
ITEM = re.compile(r"\s*(?:[-*]|\d+\.)\s+")
TARGET = re.compile(r"\]\([^)]*\)")
END = re.compile(r"(?<=[.!?])[)*\"]*\s+(?=[A-Z`*\[(\"])")
NOUN_CLAUSE = re.compile(r"(?:what|who|whatever|whoever|whichever)\b", re.IGNORECASE)


class Line(NamedTuple):
    """A line of prose, by its number in the page."""

    number: int
    text: str


def lines(page: str) -> list[Line]:
    """The lines of a page; those that are not prose are empty, so that numbers stay."""
    blanked = NOT_PROSE.sub(lambda found: "\n" * found.group().count("\n"), page)
    return [
        Line(number, "" if text.startswith("    ") or text.lstrip().startswith(OTHER) else text.rstrip())
        for number, text in enumerate(blanked.split("\n"), 1)
    ]


def sentences(page: str) -> Iterator[Line]:
    """The sentences of a page as plain text, each with the number of the line where its paragraph begins."""
    paragraph: list[Line] = []
    for line in [*lines(page), Line(0, "")]:
        item = ITEM.match(line.text)
        if paragraph and (item or not line.text):
            yield from _of(paragraph)
            paragraph = []
        if line.text:
            paragraph.append(Line(line.number, line.text[item.end() :] if item else line.text))


def _of(paragraph: list[Line]) -> Iterator[Line]:
    text = " ".join(line.text.strip() for line in paragraph)
    text = re.sub(r"`[^`]*`", "code", TARGET.sub("]", text)).replace("[", "").replace("]", "")
    yield from (Line(paragraph[0].number, sentence) for sentence in END.split(text) if words(sentence))


def words(sentence: str) -> int:
    """How many words a sentence has."""
    return sum(any(map(str.isalnum, word)) for word in sentence.split())


def faults(page: str) -> Iterator[str]:
    """Faults of a page's prose, each as "line: what is wrong"."""
    counts = []
    for number, sentence in sentences(page):
        counts.append(words(sentence))
        if counts[-1] > LONGEST_SENTENCE:
            yield f"{number}: a sentence of {counts[-1]} words (at most {LONGEST_SENTENCE}): {sentence[:60]}..."
        if NOUN_CLAUSE.match(sentence.lstrip("*_")) and not sentence.rstrip("*_").endswith("?"):
            yield f"{number}: a sentence begins with a noun clause: {sentence[:60]}..."
    if counts and sum(counts) / len(counts) >= AVERAGE_SENTENCE:
        yield f"1: {sum(counts) / len(counts):.1f} words a sentence on average (below {AVERAGE_SENTENCE})"
    for number, text in lines(page):
        if len(TARGET.sub("]()", text)) > WIDTH:
            yield f"{number}: a line of {len(text)} columns (at most {WIDTH})"


def pages(patterns: Iterable[str] = DONE) -> list[Path]:
    """The pages that are checked."""
    generated = {ROOT / page for page in GENERATED}
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern)) if path not in generated]


def main(arguments: list[str] | None = None) -> int:
    """Print every fault: 0, or 1 where there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prose", type=Path, help="folder for the prose alone, line by line, for other checks")
    options = parser.parse_args(arguments)
    found = 0
    for path in pages():
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
        for fault in faults(text):
            sys.stderr.write(f"{name}:{fault}\n")
            found += 1
        if options.prose:
            (options.prose / name).parent.mkdir(parents=True, exist_ok=True)
            prose = (re.sub(r"`[^`]*`", "code", TARGET.sub("]", line.text)) for line in lines(text))
            (options.prose / name).write_text("\n".join(prose), encoding="utf-8")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
