"""First runs on few rows: what a rate, a length and the number of scored examples are worth, by data set and size.

    OMP_NUM_THREADS=1 python benchmarks/first_runs.py --glue data/glue

Data: ratings of reviews, tweets and editorials by people, from the package that `demo/fetch.py` takes the movie reviews
from, as two classes; `eight` is a task with many classes made of them: which of the four sources a text is from, and
whether it is rated positive or negative. With `--glue`, a folder with sst2, cola and rte in the hub's
columns, these as well. A cell that is done is not run again. The rule that the numbers led to is `lightpeft.schedule`.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import publishing
from rich.console import Console

from lightpeft.app.cli.command import quiet
from lightpeft.app.evaluation.reports import evaluate_model
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.reproduce.grid import slug
from lightpeft.config import run_config_from_dict
from lightpeft.errors import LightPeftError
from lightpeft.files import file_checksum, read_json, write_json
from lightpeft.plans.records import EstimationRecord
from lightpeft.profiling import hardware

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "demo"))
import fetch  # noqa: E402

SOURCES = {
    "movies": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}
"""Data set -> the file of ratings that it is made of."""
GLUE = {"sst2": ("sentence",), "cola": ("sentence",), "rte": ("sentence1", "sentence2")}
"""Task -> its columns of text."""
OF_EACH_SOURCE, TEST_ROWS = 3000, 600
BEFORE = (3e-4, 3)
"""Rate and epochs of every run before there was a rule."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run."""

    data: str
    rows: int
    method: str = "light"
    learning_rate: float | str = "auto"
    epochs: float | str = "auto"
    estimation: int | None = None
    """Steps of estimation; None: as the preset has it."""
    seed: int = 0
    ratio: float | None = None
    """As in docs/shell.md the command for one's own data: part of heads and neurons to remove, in a run that holds out
    a fifth of its file; measured on further rows. None: as the preset has it, and all rows train."""

    @property
    def name(self) -> str:
        """Its name in files."""
        return slug("-".join(str(value) for value in asdict(self).values()))


def defaults() -> list[Cell]:
    """The rule, beside what was there before."""
    sizes = {"amazon": 300, "nyt": 500, "eight": 500, "movies": 600, "tweets": 600}
    light = [cell for data, rows in sizes.items() for cell in (Cell(data, rows), Cell(data, rows, "light", *BEFORE))]
    plain = [Cell("movies", 600, "plain"), Cell("movies", 600, "plain", *BEFORE)]
    full = [Cell("movies", 600, "full"), Cell("movies", 600, "full", epochs=3)]
    larger = {"cola": (1000,), "rte": (2000,), "sst2": (2000, 10_000)}
    more = [Cell(data, rows) for data, many in larger.items() for rows in many]
    more += [Cell(data, many[0], "light", *BEFORE) for data, many in larger.items()]
    again = [Cell(data, rows, seed=1) for data, rows in sizes.items()]
    return [*light, *plain, *full, *more, *again]


def rates() -> list[Cell]:
    """Rates and lengths around the rule."""
    tried = {
        ("movies", 600): ((1e-3, 5.33), (1e-3, 10.67), (1e-3, 16), (3e-3, 10.67)),
        ("eight", 500): ((1e-3, 12.8), (1e-3, 19), (1e-3, 25.6), (3e-3, 12.8)),
        ("amazon", 300): ((1e-3, 21.33),),
        ("tweets", 600): ((1e-3, 10.67),),
    }
    return [Cell(*of, "light", *pair) for of, pairs in tried.items() for pair in pairs]


def examples() -> list[Cell]:
    """How many examples a plan takes: estimations of 2 to 32 steps in runs of equal length."""
    first = [Cell("movies", 1000, "light", 1e-3, 3.84, steps) for steps in (2, 4, 8, 16, 32)]
    again = [Cell("movies", 1000, "light", 1e-3, 3.84, steps, seed=1) for steps in (2, 8, 16)]
    return [*first, *again, *(Cell("eight", 1000, "light", 1e-3, 6.4, steps) for steps in (2, 4, 8, 16, 32))]


def own() -> list[Cell]:
    """The command for one's own data, in docs/shell.md."""
    sizes = {"amazon": 300, "nyt": 500, "movies": 600, "tweets": 700}
    return [Cell(data, rows, ratio=0.5) for data, rows in sizes.items()]


QUESTIONS = {"own": own, "defaults": defaults, "rates": rates, "examples": examples}


def main(arguments: list[str] | None = None) -> int:
    """Run what is not done, and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--model", default=str(ROOT / "demo" / "cache" / "minilm"))
    parser.add_argument(
        "--glue", type=Path, help="folder with sst2, cola and rte: train.jsonl and validation.jsonl each"
    )
    parser.add_argument("--out", type=Path, default=Path("runs") / "first_runs")
    publishing.add_option(parser)
    given = parser.parse_args(arguments)
    quiet()
    try:
        make_data(given.out / "data", given.glue)
        cells = [cell for question in given.questions for cell in QUESTIONS[question]()]
        there = [cell for cell in cells if cell.data not in GLUE or given.glue]
        reports = [report(cell, given.model, given.out) for cell in there]
        results = {
            "cells": reports,
            "hardware": hardware(),
            "command": publishing.command("first_runs", arguments),
            "logs": {cell.name: found["log"] for cell, found in zip(there, reports, strict=True)},
        }
        write_json(given.out / "results.json", results)
        if given.write_readme:
            publishing.publish("first_runs", markdown(reports), "first_runs.results.json", results)
    except LightPeftError as error:
        publishing.say(f"first_runs: {error}")
        return 2
    Console(width=160).print(markdown(reports), markup=False)
    return 0


# -- data --------------------------------------------------------------------------------------------------------------


def make_data(folder: Path, glue: Path | None) -> None:
    """Write <data>.train.csv and <data>.test.csv of every data set that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "eight.test.csv").is_file():
        rated = dict(ratings())
        for name, rows in rated.items():
            write_parts(folder, name, fetch.split(rows, "text"))
        write_parts(folder, "eight", fetch.split(eight(rated), "text"))
    for task, columns in GLUE.items() if glue else ():
        if not (folder / f"{task}.test.csv").is_file():
            files = {"train": "train", "test": "validation"}
            parts = {
                part: glue_rows(Path(glue or "") / task / f"{file}.jsonl", columns) for part, file in files.items()
            }
            write_parts(folder, task, parts)


def ratings() -> Iterator[tuple[str, list[Row]]]:
    """Each source's texts with the sign of their mean rating, without the near-neutral."""
    with tempfile.TemporaryDirectory() as temporary:
        package = fetch.download(fetch.VADER, Path(temporary) / "download")
        inner = Path(temporary) / "ratings.tar.gz"
        fetch.extract(package, fetch.VADER.key_file, inner)
        fetch.check_digest(inner, fetch.VADER.key_sha256)
        for name, file in SOURCES.items():
            text = Path(temporary) / f"{name}.txt"
            fetch.extract(inner, f"hutto_ICWSM_2014/{file}_GroundTruth.txt", text)
            yield name, list(rated_rows(text))


def rated_rows(path: Path) -> Iterator[Row]:
    """Rows of one file of ratings."""
    with path.open(encoding="utf-8", errors="replace", newline="") as lines:
        for _, rating, text in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            if abs(float(rating)) >= 0.25:
                yield {"text": text, "label": "positive" if float(rating) > 0 else "negative"}


def eight(rated: dict[str, list[Row]]) -> list[Row]:
    """The task with eight classes, about equally many rows of each source."""
    chosen = []
    for source, rows in rated.items():
        random.Random(1).shuffle(rows)
        chosen += [{"text": row["text"], "label": f"{source} {row['label']}"} for row in rows[:OF_EACH_SOURCE]]
    return chosen


def glue_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """Rows of a task in the hub's columns."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: row[name] for name in (*columns, "label")} for row in rows]


def write_parts(folder: Path, name: str, parts: dict[str, list[Row]]) -> None:
    """Both parts in random order; of the test rows so many as tell three points apart."""
    for part, rows in parts.items():
        random.Random(0).shuffle(rows)
        with (folder / f"{name}.{part}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows[:TEST_ROWS] if part == "test" else rows)


# -- runs --------------------------------------------------------------------------------------------------------------


def report(cell: Cell, model: str, out: Path) -> dict[str, Any]:
    """What a cell's run gave, which is run now if it is not done."""
    file = out / "cells" / f"{cell.name}.json"
    if not file.is_file():
        publishing.say(cell.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, run(cell, model, out))
    return read_json(file)


def run(cell: Cell, model: str, out: Path) -> dict[str, Any]:
    """One run in a new folder, which goes away."""
    folder = out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    config = run_config_from_dict(settings(cell, model, out / "data", folder))
    work = pipeline.prepare(config)
    found = pipeline.run(config)
    scored = EstimationRecord.load(work.run.estimation).meta if cell.method == "light" else {}
    if cell.ratio is not None:
        test = {"data": {"test": str(out / "data" / f"{cell.data}.test.csv")}}
        found = evaluate_model(work.run.adapter, test, batch_size=64)["model"]
    return {
        **asdict(cell),
        "accuracy": found["metrics"]["accuracy"],
        "majority": majority(out / "data" / f"{cell.data}.test.csv"),
        "steps": work.steps,
        "scored_examples": scored.get("scored_examples"),
        "log": file_checksum(work.run.log),
        "settled": {name: getattr(work.config.training, name) for name in ("learning_rate", "epochs")},
    }


def settings(cell: Cell, model: str, data: Path, folder: Path) -> dict[str, Any]:
    """The cell's config, as `lightpeft run` would have it from options."""
    columns = dict(zip(("text", "text_pair"), GLUE.get(cell.data, ("text",)), strict=False))
    files = {part: str(data / f"{cell.data}.{part}.csv") for part in ("train", "test")}
    if cell.ratio is not None:
        files = {"train": str(first_rows(data, cell))}
    rate = "full_learning_rate" if cell.method == "full" and cell.learning_rate != "auto" else "learning_rate"
    return {
        "output": str(folder),
        "preset": "default",
        "method": cell.method,
        "seed": cell.seed,
        "model": {"name": model},
        "data": {**files, **columns, **({} if cell.ratio else {"limit_train": cell.rows})},
        "training": {rate: cell.learning_rate, "epochs": cell.epochs},
        "light": light_settings(cell),
    }


def light_settings(cell: Cell) -> dict[str, Any]:
    """Estimation and budget of a cell; what it is to measure must not be refused."""
    if cell.ratio is not None:
        return {"heads": cell.ratio, "neurons": cell.ratio}
    return {"least_examples": 0, **({"length": cell.estimation} if cell.estimation else {})}


def first_rows(data: Path, cell: Cell) -> Path:
    """A file of the first training rows, as a user has one."""
    file = data / f"{cell.data}.own.csv"
    with (data / f"{cell.data}.train.csv").open(encoding="utf-8", newline="") as rows:
        chosen = list(itertools.islice(csv.DictReader(rows), cell.rows))
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(chosen[0]))
        writer.writeheader()
        writer.writerows(chosen)
    return file


def majority(path: Path) -> float:
    """Accuracy of always giving the most frequent label."""
    with path.open(encoding="utf-8", newline="") as file:
        counts = Counter(row["label"] for row in csv.DictReader(file))
    return counts.most_common(1)[0][1] / counts.total()


def markdown(reports: Iterable[dict[str, Any]]) -> str:
    """One row a cell."""
    header = (
        "data",
        "rows",
        "method",
        "seed",
        "rate",
        "epochs",
        "steps",
        "scored examples",
        "majority, %",
        "accuracy, %",
    )
    return publishing.markdown_table(header, [row_of(each) for each in reports])


def row_of(found: dict[str, Any]) -> list[str]:
    """A cell's line; what was auto is marked."""
    said = {name: f"{found['settled'][name]:g}" for name in ("learning_rate", "epochs")}
    marked = {name: f"{value} (auto)" if found[name] == "auto" else value for name, value in said.items()}
    return [
        found["data"],
        f"{found['rows']:,}",
        found["method"] if found["ratio"] is None else "the command for one's own data",
        str(found["seed"]),
        "2e-5" if found["method"] == "full" and found["learning_rate"] == "auto" else marked["learning_rate"],
        marked["epochs"],
        f"{found['steps']:,}",
        f"{found['scored_examples']:,}" if found["scored_examples"] else "-",
        f"{100 * found['majority']:.1f}",
        f"{100 * found['accuracy']:.1f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
