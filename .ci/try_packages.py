"""Install each archive of a folder into an empty environment, and do there what README shows first.

    python .ci/try_packages.py dist build/release

`lightpeft demo` downloads a model and rows by pip, into a cache of its own. The hub's names in README are folders with
them there, so nothing is loaded from the hub. An environment that passed is removed: it has 3 to 7 GB.
`make test-release` calls it. Needs nothing but Python and a package index.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROWS = 600
"""Of README's data: few, but enough for the estimation."""
BESIDE = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"}
BESIDE |= {"setup.cfg", "setup.py"}
"""Files of an sdist beside the sources."""
PLUGIN = (
    "from importlib.metadata import entry_points as found; "
    "assert [callable(each.load()) for each in found(group='vllm.general_plugins')] == [True]"
)
"""vLLM's way to the plug-in; what it does then needs vLLM."""


def names(archive: Path) -> list[PurePosixPath]:
    """The files in a wheel or an sdist."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return [PurePosixPath(name) for name in wheel.namelist()]
    with tarfile.open(archive) as sdist:
        return [PurePosixPath(member.name) for member in sdist.getmembers() if member.isfile()]


def foreign(archive: Path) -> list[str]:
    """Files of an archive that are neither the package nor what describes it: tests, benchmarks, results."""
    package = re.split(r"-\d", archive.name)[0]
    if archive.suffix == ".whl":
        return [str(name) for name in names(archive) if not re.fullmatch(rf"{package}(-.+\.dist-info)?", name.parts[0])]
    inside = [PurePosixPath(*name.parts[1:]) for name in names(archive)]
    sources = re.compile(rf"src/{package}(\.egg-info)?/.+")
    return [str(name) for name in inside if not sources.fullmatch(str(name)) and str(name) not in BESIDE]


def readme_steps(folder: Path, cache: Path) -> Iterator[list[str]]:
    """Hand out README's first command (demo), its program and its second command (run); lay out what these two name."""
    blocks = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    program = next(code for language, code in blocks if language == "python")
    lines = [line for _, code in blocks for line in code.splitlines() if line.startswith("lightpeft ")]
    first, second = map(shlex.split, lines[:2])
    yield first
    with (cache / "movie_reviews" / "train.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows = rows[:: len(rows) // ROWS][:ROWS]
    shutil.copytree(cache / "minilm", folder / "sentence-transformers" / "all-MiniLM-L6-v2")
    (folder / "cornell-movie-review-data" / "rotten_tomatoes").mkdir(parents=True)
    numbered = [{"text": row["text"], "label": int(row["label"] == "positive")} for row in rows]
    write(folder / "cornell-movie-review-data" / "rotten_tomatoes" / "train.csv", numbered)
    write(folder / "reviews.csv", [{"review": row["text"], "stars": row["label"]} for row in rows])
    (folder / "snippet.py").write_text(program, encoding="utf-8")
    yield ["python", "snippet.py"]
    yield second


def write(path: Path, rows: list[dict[str, str | int]]) -> None:
    """Write rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def run(environment: Path, command: list[str], folder: Path, **variables: str) -> None:
    """Run a program of an environment, with nothing of this repository in reach, and say how long it took."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    began = time.monotonic()
    program = str(environment / "bin" / command[0])
    subprocess.run([program, *command[1:]], cwd=folder, check=True, env={**kept, **variables})
    say(f"{environment.name}: {shlex.join(command)[:80]}: {time.monotonic() - began:.0f} s")


def say(line: str) -> None:
    """A line of what was tried."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def first_steps(environment: Path, work: Path) -> None:
    """Do what README shows first, in an empty folder, and look at what that leaves."""
    run(environment, ["lightpeft", "--version", "--verbose"], work)
    for command in readme_steps(work, work / "cache" / "lightpeft" / "demo"):
        run(environment, command, work, HF_HUB_OFFLINE="1", XDG_CACHE_HOME=str(work / "cache"))
    for left in ("runs/demo/light/metrics.json", "adapter/lightpeft.json", "runs/stars/metrics.json"):
        if not (work / left).exists():
            sys.exit(f"{environment.name}: README's first steps did not leave {left}")


def main(dist: Path, folder: Path) -> None:
    """Try every archive; the first failure ends it."""
    archives = sorted(dist.glob("*.whl")) + sorted(dist.glob("*.tar.gz"))
    if len(archives) != 4:
        sys.exit(f"{dist} has {len(archives)} archives; make dist makes four, two of each package")
    shutil.rmtree(folder, ignore_errors=True)
    for archive in archives:
        if found := foreign(archive):
            sys.exit(f"{archive.name} has files that are no part of the package: {', '.join(found[:5])}")
        environment = folder / (
            "-".join(archive.name.split("-")[:1]) + ("-wheel" if archive.suffix == ".whl" else "-sdist")
        )
        venv.create(environment, with_pip=True)
        work = environment / "work"
        work.mkdir()
        run(environment, ["python", "-m", "pip", "install", "--quiet", str(archive)], work)
        if archive.name.startswith("lightpeft_vllm"):
            run(environment, ["python", "-c", PLUGIN], work)
        else:
            first_steps(environment, work)
        shutil.rmtree(environment)
    say(f"{len(archives)} archives were installed and tried")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
