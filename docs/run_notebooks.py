"""Run the notebooks of examples/ on the real models and rows of `demo/cache`, and keep their outputs: `make notebooks`.

Each runs in a copy of its surroundings, where folders with the names of the models come before the hub. So nothing is
downloaded, and nothing is written beside the notebooks. Progress bars and absolute paths are not kept.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "examples" / "notebooks"
MODELS = {"minilm": "sentence-transformers/all-MiniLM-L6-v2", "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Folder in the cache -> name on the hub."""
PROGRESS = re.compile(r"<progress.*?</progress>|<style>.*?</style>|\[\d+/\d+ [^\]]*\]", re.DOTALL)
"""Parts of a trainer's table that are no table: its bar, and the seconds on a machine that may be busy."""
TAG = re.compile(r"<[^>]*>")


def surroundings(folder: Path, cache: Path) -> Path:
    """Make a folder for notebooks to run in, with the repository's shape around it; returns it."""
    home = folder / "examples" / "notebooks"
    home.mkdir(parents=True)
    (folder / "demo").mkdir()
    (folder / "demo" / "cache").symlink_to(cache.resolve())
    for script in NOTEBOOKS.parent.glob("*.py"):
        (home.parent / script.name).symlink_to(script)
    for cached, name in MODELS.items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).symlink_to(cache.resolve() / cached)
    return home


def run(notebook: Path, home: Path) -> Any:
    """Run all cells of a notebook in `home`, and return it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    book = nbformat.read(notebook, as_version=4)
    client = NotebookClient(book, timeout=None, kernel_name="python3", record_timing=False)
    client.execute(cwd=str(home))
    return book


def clean(book: Any) -> None:
    """Leave out what is of no use to readers: progress, what went to stderr, and how Python was set up."""
    book.metadata.language_info = {"name": "python"}
    for cell in (cell for cell in book.cells if cell.cell_type == "code"):
        cell.outputs = list(_kept(cell.outputs))


def _kept(outputs: list[Any]) -> Iterator[Any]:
    for output in outputs:
        if output.output_type == "stream" and output.name == "stderr":
            continue
        data = output.get("data", {})
        if "time left" in data.get("text/plain", ""):
            continue
        if "text/html" in data:
            data["text/html"] = PROGRESS.sub("", data["text/html"])
            if not TAG.sub("", data["text/html"]).strip():
                continue
        if "image/png" in data:  # the words beside a picture say its type alone
            data.pop("text/plain", None)
        yield output


def main(arguments: list[str] | None = None) -> int:
    """Run notebooks and write them with their outputs; 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", type=Path, nargs="*", default=sorted(NOTEBOOKS.glob("*.ipynb")))
    parser.add_argument("--cache", type=Path, default=ROOT / "demo" / "cache", help="what demo/fetch.py filled")
    options = parser.parse_args(arguments)
    for notebook in options.notebooks:
        with tempfile.TemporaryDirectory() as folder:
            book = run(notebook, surroundings(Path(folder), options.cache))
        clean(book)
        nbformat.write(book, notebook)
        sys.stdout.write(f"{notebook.name}: {notebook.stat().st_size / 1024:.0f} KiB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
