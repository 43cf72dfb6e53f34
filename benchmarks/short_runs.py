"""Runs on few rows: what a fixed budget costs, and what the command of README gives, beside plain LoRA.

    OMP_NUM_THREADS=1 python benchmarks/short_runs.py budgets --data data
    OMP_NUM_THREADS=1 python benchmarks/short_runs.py first --data data

`budgets` fixes 20, 40 and 60% of the blocks (all epochs run), in bfloat16. `first` gives the command
of README a file of so many rows, of which it holds out a fifth, and says nothing about what to remove or how long to
train. Both are measured on 600 rows that no run has seen. Data: ratings of reviews, tweets and editorials by people,
from the package that `lightpeft demo` takes its rows from, as two classes; `eight` is which of the four sources
a text is from, and whether it is rated positive or negative. `--data` is a folder with sst2, cola, rte and banking77 in
the hub's columns. A cell that is done is not run again.
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
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import publishing
from rich.console import Console

from lightpeft.app.cli.command import quiet
from lightpeft.app.evaluation.reports import evaluate_model
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.demo import fetching
from lightpeft.config import run_config_from_dict
from lightpeft.errors import LightPeftError
from lightpeft.files import read_json, write_json
from lightpeft.profiling.surroundings import hardware
from lightpeft.training.schedule import auto_epochs

ROOT = Path(__file__).parents[1]

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
Row = dict[str, Any]
TASKS = ("movies", "amazon", "nyt", "tweets", "eight", "sst2")
"""What the fixed budget was chosen on."""
FIRST = ("movies", "sst2", "banking77")
"""What the command of README is tried on; nothing was chosen on the last one."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    question: str
    data: str
    rows: int
    """That train, of `budgets`; of the user's file, of `first`."""
    method: str
    blocks: float | None = None
    """Part of the blocks to remove; None: what the run finds."""
    seed: int = 0

    @property
    def name(self) -> str:
        """Its name in files."""
        budget = "" if self.blocks is None else f"-{self.blocks:.0%}"
        return f"{self.question}-{self.data}-{self.rows}-{self.method}{budget}-{self.seed}"


def budgets() -> Iterator[Cell]:
    """Training rows of a file of 600, of which a fifth is held out."""
    for data in TASKS:
        yield Cell("budgets", data, 480, "plain")
        yield from (Cell("budgets", data, 480, "light", part) for part in (0.2, 0.4, 0.6))


def first() -> Iterator[Cell]:
    """Files of three sizes."""
    for rows, data, method in itertools.product((600, 300, 1000), FIRST, ("light", "plain")):
        yield Cell("first", data, rows, method)


QUESTIONS: dict[str, Callable[[], Iterator[Cell]]] = {"budgets": budgets, "first": first}


def main(arguments: list[str] | None = None) -> int:
    """Run what is not done, and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("--model", default=str(ROOT / "demo" / "cache" / "minilm"))
    parser.add_argument("--data", type=Path, help="folder with sst2, cola, rte and banking77")
    parser.add_argument("--out", type=Path, default=Path("runs") / "short_runs")
    publishing.add_option(parser)
    given = parser.parse_args(arguments)
    quiet()
    try:
        make_data(given.out / "data", given.data)
        if given.data is not None:
            intents(given.out / "data", given.data)
        there = [cell for cell in QUESTIONS[given.question]() if data_file(given.out, cell.data, "test").is_file()]
        found = [report(cell, given.model, given.out) for cell in there]
        if given.write_readme:
            name = f"short_runs.{given.question}"
            results = {"cells": found, "hardware": hardware(), "command": publishing.command("short_runs", arguments)}
            publishing.publish(name, markdown(found), f"{name}.results.json", results)
    except LightPeftError as error:
        publishing.say(f"short_runs: {error}")
        return 2
    Console(width=160).print(markdown(found), markup=False)
    return 0


# -- data --------------------------------------------------------------------------------------------------------------


def make_data(folder: Path, source: Path | None) -> None:
    """Write <data>.train.csv and <data>.test.csv of every data set that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "eight.test.csv").is_file():
        rated = dict(ratings())
        for name, rows in rated.items():
            write_parts(folder, name, fetching.split(rows, "text"))
        write_parts(folder, "eight", fetching.split(eight(rated), "text"))
    for task, columns in GLUE.items() if source else ():
        if not (folder / f"{task}.test.csv").is_file():
            files = {"train": "train", "test": "validation"}
            parts = {
                part: glue_rows(Path(source or "") / task / f"{file}.jsonl", columns) for part, file in files.items()
            }
            write_parts(folder, task, parts)


def ratings() -> Iterator[tuple[str, list[Row]]]:
    """Each source's texts with the sign of their mean rating, without the near-neutral."""
    with tempfile.TemporaryDirectory() as temporary:
        package = fetching.download(fetching.VADER, Path(temporary) / "download")
        inner = Path(temporary) / "ratings.tar.gz"
        fetching.extract(package, fetching.VADER.key_file, inner)
        fetching.check_digest(inner, fetching.VADER.key_sha256)
        for name, file in SOURCES.items():
            text = Path(temporary) / f"{name}.txt"
            fetching.extract(inner, f"hutto_ICWSM_2014/{file}_GroundTruth.txt", text)
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
        write_rows(folder / f"{name}.{part}.csv", rows[:TEST_ROWS] if part == "test" else rows)


def data_file(out: Path, data: str, part: str) -> Path:
    """Rows of a data set."""
    return out / "data" / f"{data}.{part}.csv"


def intents(folder: Path, source: Path) -> None:
    """banking77 in the form of the others, all intents in turn, so that a file of a few hundred rows has each."""
    if not (folder / "banking77.test.csv").is_file():
        parts = {part: glue_rows(source / "banking77" / f"{part}.jsonl", ("text",)) for part in ("train", "test")}
        write_parts(folder, "banking77", parts)
        train = folder / "banking77.train.csv"
        write_rows(train, in_turn(read_rows(train)))


def in_turn(rows: list[Row]) -> list[Row]:
    """The first row of each label, then the second of each, and so on."""
    seen: Counter[str] = Counter()
    places = []
    for row in rows:
        places.append(seen[row["label"]])
        seen[row["label"]] += 1
    return [row for _, row in sorted(zip(places, rows, strict=True), key=lambda pair: pair[0])]


def majority(path: Path) -> float:
    """Accuracy of always giving the most frequent label."""
    with path.open(encoding="utf-8", newline="") as file:
        counts = Counter(row["label"] for row in csv.DictReader(file))
    return counts.most_common(1)[0][1] / counts.total()


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
    """One run in a new folder, which goes away; processor time, for machines that do other work as well."""
    folder = out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    config = run_config_from_dict(settings(cell, model, out, folder))
    work = pipeline.prepare(config)
    started = time.process_time()
    found = pipeline.run(config)
    seconds = time.process_time() - started
    measured = found["metrics"]
    if cell.question == "first":
        test = {"data": {"test": str(data_file(out, cell.data, "test")), "columns": columns_of(cell.data)}}
        measured = evaluate_model(work.run.result, test, batch_size=64)["model"]["metrics"]
    return {
        **asdict(cell),
        "accuracy": measured["accuracy"],
        "loss": measured["loss"],
        "majority": majority(data_file(out, cell.data, "test")),
        "cpu_seconds": seconds,
        "steps": work.steps,
        "stopped": found.get("stopped"),
        "removed": found.get("budget", {}).get("blocks", cell.blocks),
        "unmeasured": found.get("budget", {}).get("unmeasured"),
    }


def columns_of(data: str) -> dict[str, str]:
    """Where the texts of a data set are."""
    return dict(zip(("text", "text_pair"), GLUE.get(data, ("text",)), strict=False))


def settings(cell: Cell, model: str, out: Path, folder: Path) -> dict[str, Any]:
    """The cell's config, as `lightpeft run` would have it from options."""
    columns = columns_of(cell.data)
    train = data_file(out, cell.data, "train")
    common = {"output": str(folder), "method": cell.method, "seed": cell.seed, "model": {"name": model}}
    if cell.question == "first":
        return {**common, "data": {"train": str(own_file(train, cell.rows)), "columns": columns}}
    files = {"train": str(train), "test": str(data_file(out, cell.data, "test")), "limit_train": cell.rows}
    return {
        **common,
        "data": {**files, "columns": columns},
        "training": {"precision": "bf16", "epochs": epochs_of(cell.rows)},
        "light": 0.6 if cell.blocks is None else cell.blocks,
    }


def epochs_of(rows: int) -> int:
    """What `training.epochs: auto` stands for; said as a number, training runs to its end."""
    return auto_epochs(-(-rows // 32))


def own_file(train: Path, rows: int) -> Path:
    """The first training rows, as a user has them."""
    file = train.with_name(f"{train.stem}.{rows}.csv")
    write_rows(file, read_rows(train)[:rows])
    return file


def read_rows(file: Path) -> list[Row]:
    """Rows of a CSV file."""
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def write_rows(file: Path, rows: list[Row]) -> None:
    """The same the other way round."""
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def markdown(found: list[dict[str, Any]]) -> str:
    """One row a cell."""
    header = ("data", "rows", "method", "blocks removed, %", "steps", "CPU s", "majority, %", "accuracy, %", "loss")
    return publishing.markdown_table(header, [row_of(each) for each in found])


def row_of(found: dict[str, Any]) -> list[str]:
    """A cell's line."""
    stopped = found["stopped"]
    steps = f"{found['steps']}" if stopped is None else f"{stopped['step']} of {found['steps']}, {stopped['kept']} kept"
    return [
        found["data"],
        f"{found['rows']:,}",
        found["method"],
        "-" if found["removed"] is None else f"{100 * found['removed']:.0f}",
        steps,
        "-" if found["cpu_seconds"] is None else f"{found['cpu_seconds']:.0f}",
        f"{100 * found['majority']:.1f}",
        f"{100 * found['accuracy']:.1f}",
        f"{found['loss']:.3f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
