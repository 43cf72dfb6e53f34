"""The notebooks of examples/ run to the last cell; their committed outputs are those of one run, and small."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import workbench
from lanes import thorough
from questions import CHAT_TEMPLATE

nbformat = pytest.importorskip("nbformat")
errors = pytest.importorskip("nbclient.exceptions")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))

from make_site import LINK  # noqa: E402
from run_notebooks import NOTEBOOKS, clean, run, surroundings  # noqa: E402
from style import faults  # noqa: E402

BOOKS = sorted(NOTEBOOKS.glob("*.ipynb"))
books = pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
LARGEST = 300 * 1024
"""Bytes of a notebook with its outputs."""
TOLD = {
    "chat": r"loss of held-out answers, in nats a token: (\d+\.\d\d) before, (\d+\.\d\d) after",
    "classify_csv": r"in int8: +(\d+\.\d)% of [\d,]+ rows are right\nin float32: (\d+\.\d)%",
    "pictures": r"held-out loss: (\d\.\d+) before the cut, (\d\.\d+) after it, (\d\.\d+) in the end",
}
"""Notebook -> what it says in the end, with its numbers."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where notebooks run, with tiny models and rows in place of those of the demo's cache."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workbench, "POSITIONS", 256)
        workbench.save_base(cache / "minilm", "bert")
        words = [" ".join((*workbench.NEUTRAL, *workbench.GOOD, *workbench.BAD, "user assistant"))]
        workbench.save_base(cache / "smollm2", "llama", tokenizer=workbench.tokenizer_of_bytes(texts=words))
    (cache / "smollm2/chat_template.jinja").write_text(CHAT_TEMPLATE)
    for name in ("movie_reviews", "socialiqa"):
        (cache / name).mkdir()
    workbench.write_rows(cache / "movie_reviews/train.csv", workbench.labeled(2600))
    for split, count in (("train", 96), ("test", 8)):
        rows = [{**row, "question": row["prompt"]} for row in workbench.completions(count)]
        workbench.write_rows(cache / f"socialiqa/{split}.jsonl", rows)
    return surroundings(tmp_path_factory.mktemp("repository"), cache)


def printed(book: Any) -> str:
    """What the cells print."""
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def numbers(path: Path, book: Any) -> list[float]:
    """The numbers that a notebook says in the end."""
    found = re.search(TOLD[path.stem], printed(book))
    assert found is not None, printed(book)
    return [float(number) for number in found.groups()]


@thorough
@books
def test_every_cell_runs(path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models learn in them, too."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    book = run(path, home)
    found = numbers(path, book)
    if path.stem == "classify_csv":
        assert min(found) > 70
        assert re.findall(r'"label": "(\w+)"', printed(book)), "the server answers"
    elif path.stem == "chat":
        assert found[1] < found[0]
    else:
        assert found[2] < found[1], "the loss after the cut is won back"


@books
def test_outputs_are_of_one_run_in_order(path: Path) -> None:
    text, book = path.read_text(encoding="utf-8"), nbformat.read(path, as_version=4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert 10 <= len(book.cells) <= 18 and book.cells[0].source.startswith("# ")
    assert path.stat().st_size <= LARGEST
    for unwanted in ("<progress", "stderr", '"error"', "/tmp/", "/home/", "/root/", "/work/"):
        assert unwanted not in text, unwanted
    cleaned = nbformat.from_dict(book)
    clean(cleaned)
    assert cleaned == book
    assert numbers(path, book)


@books
def test_links_lead_to_files(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    words = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    found = LINK.findall(words)
    assert found and all((path.parent / target).exists() for target, _ in found), found


@books
def test_prose_is_plain(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    assert not list(faults("\n\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")))


@thorough
def test_a_cell_that_raises_ends_the_run(home: Path, tmp_path: Path) -> None:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(book, tmp_path / "wrong.ipynb")
    with pytest.raises(errors.CellExecutionError, match="ZeroDivisionError"):
        run(tmp_path / "wrong.ipynb", home)
