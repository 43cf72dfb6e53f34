"""Build the documentation site: the pages of zensical.toml and whatever they link to, in the shape of the repository.

Pages lie on the site as they lie here, so that a relative link leads to the same thing on both: to another page, or to
a config, a program or a file of numbers, which the site has a copy of. Neither building nor reading needs a network.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightpeft.errors import LightPeftError, require

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "zensical.toml"
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(\s*(?!https?:|mailto:)([^)\s#]*)(?:#([^)\s]*))?\)")


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Internal links and pictures of a page: the path as it is written ("": the page itself), the anchor ("": none)."""
    yield from LINK.findall(CODE.sub("`code`", page.read_text(encoding="utf-8")))


def entries(nav: Iterable[Any]) -> Iterator[str]:
    """Paths of the pages in a navigation of zensical.toml, in their order."""
    for entry in nav:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            yield from entries(entry.values())
        else:
            yield from entries(entry)


def collect(root: Path, pages: Iterable[str]) -> list[Path]:
    """The pages, and all files and folders that they link to, as paths below `root`; folders come with their files.

    Raises:
        LightPeftError: a page links to what is not there, is outside the repository, or is a page that the site lacks.
    """
    listed = [root / page for page in pages]
    found = dict.fromkeys(listed)
    for page in listed:
        require(page.is_file(), f"zensical.toml lists {page.relative_to(root)}, which does not exist")
        for path, _ in links(page):
            target = (page.parent / path).resolve() if path else page
            where = f"{page.relative_to(root)} links to {path}, which"
            require(target.exists() and target.is_relative_to(root), f"{where} is not in the repository")
            require(target in found or target.suffix != ".md", f"{where} has no place in the nav of zensical.toml")
            found |= dict.fromkeys([target, *files_in(target)])
    return [path.relative_to(root) for path in found]


def files_in(folder: Path) -> list[Path]:
    """Files that lie in a folder; none where it is none."""
    return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def stage(root: Path, paths: Iterable[Path], folder: Path) -> None:
    """Copy files into a folder as they lie below `root`, and list those of other folders; what was there goes."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if (root / path).is_file():
            shutil.copyfile(root / path, folder / path)
        elif not (root / path / "README.md").exists():
            (folder / path).mkdir(exist_ok=True)
            listed = "".join(f"- [{file.name}]({file.name})\n" for file in files_in(root / path))
            (folder / path / "README.md").write_text(f"# {path.as_posix()}\n\n{listed}", encoding="utf-8")


def main() -> int:
    """Build the site; 0, or 2 where a link leads nowhere."""
    project = tomllib.loads(CONFIG.read_text(encoding="utf-8"))["project"]
    try:
        paths = [*collect(ROOT, entries(project["nav"])), *map(Path, project["extra_css"])]
    except LightPeftError as error:
        sys.stderr.write(f"docs: {error}\n")
        return 2
    stage(ROOT, paths, ROOT / project["docs_dir"])
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(CONFIG)]
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
