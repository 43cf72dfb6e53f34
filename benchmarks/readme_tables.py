"""Result tables in benchmarks/README.md: each has its place between two HTML comments and is written by a script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lightpeft.errors import require

README = Path(__file__).with_name("README.md")


def fill(name: str, text: str, readme: Path = README) -> None:
    """Put `text` between `<!-- results: name -->` and `<!-- /results: name -->`.

    Raises:
        LightPeftError: the file has no such place.
    """
    start, end = f"<!-- results: {name} -->", f"<!-- /results: {name} -->"
    content = readme.read_text(encoding="utf-8")
    before, found, rest = content.partition(start)
    _, closed, after = rest.partition(end)
    require(found and closed, f"{readme} has no place for these results; add the lines {start} and {end}")
    temporary = readme.with_name(f".{readme.name}.tmp")
    temporary.write_text(f"{before}{start}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")
    temporary.replace(readme)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is aligned left and all others right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
