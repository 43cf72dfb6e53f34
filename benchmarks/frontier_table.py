"""The tables of docs/explanation/results.md with all scores of the frontier, from published results.

    python benchmarks/frontier_table.py

Reads the results files of the grids in configs/frontier and of wnut17.py; nothing is run. Scores are those that each
run measured on its test rows at its end, in per cent, as mean ± sample standard deviation over its seeds. The mean of
tasks is given for what was run on all of them.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import frontier
import publishing
from rich.console import Console

from lightpeft.app.runs.reproduce import read_results
from lightpeft.files import read_json

ROOT = Path(__file__).parents[1]
GRIDS = ("minilm", "minilm_taught", "finegates", "mpnet", "mpnet_taught")
TAUGHT = "_taught"
"""End of the names of grids with a teacher."""
CLASSIFICATION = ("movie_reviews", "sst2", "cola", "rte", "banking77")
TABLES = (
    (("minilm", "minilm_first4", "minilm_first3", "minilm_l3"), (*CLASSIFICATION, "wnut17")),
    (("mpnet", "mpnet_first6", "mpnet_first4"), ("movie_reviews", "sst2", "cola")),
)
"""Models and tasks of each table."""

Scores = Mapping[tuple[str, str], Mapping[str, Sequence[float]]]
"""Per cent for each seed, by model and method of a grid, and by task."""


def published() -> Scores:
    """Scores of everything that was run."""
    scores: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(dict)
    for model, method, task, values in (*_of_grids(), *_of_wnut17()):
        scores[model, method].setdefault(task, []).extend(100 * value for value in values)
    return scores


def _of_grids() -> Iterator[tuple[str, str, str, list[float]]]:
    for grid in GRIDS:
        taught = ", taught" if grid.endswith(TAUGHT) else ""
        for row in read_results(ROOT / "configs" / "frontier" / f"{grid}.results.json").rows:
            yield row.model, row.method + taught, row.task, row.quality


def _of_wnut17() -> Iterator[tuple[str, str, str, list[float]]]:
    for name, cell in read_json(ROOT / "benchmarks" / "minilm.wnut17.json")["cells"].items():
        model, method, _ = name.split("/")
        yield model, method, "wnut17", [cell["metrics"]["entity_f1"]]


def named(method: str) -> str:
    """A grid's method as the tables have it."""
    part, _, after = method.partition("%")
    if part.isdigit():
        return f"{part}% cut, {after.removeprefix(', ').replace('all', 'all weights', 1) or 'LoRA'}"
    return method.replace("full", "all weights").replace("lora", "LoRA")


def place(method: str) -> int:
    """Where a method has its row: by the per cent that a cut removes; whole models before all cuts, FineGates last."""
    part = method.partition("%")[0]
    if part.isdigit():
        return int(part)
    return 100 if method.startswith("FineGates") else -1


def table(scores: Scores, models: Sequence[str], tasks: Sequence[str]) -> str:
    """One row for each model and method, smaller cuts first."""
    header = ["test score, %", *(frontier.TITLES[task] for task in tasks)]
    means = [chosen for chosen in (CLASSIFICATION, tasks) if set(chosen) <= set(tasks)]
    header += [f"mean of {len(chosen)}" for chosen in means]
    rows = []
    shown = [key for key in scores if key[0] in models]
    for model, method in sorted(shown, key=lambda key: (models.index(key[0]), place(key[1]))):
        of_task = scores[model, method]
        row = [f"{frontier.named(model)}, {named(method)}", *(cell(of_task.get(task, ())) for task in tasks)]
        for chosen in means:
            known = [statistics.fmean(of_task[task]) for task in chosen if task in of_task]
            row.append(f"{statistics.fmean(known):.1f}" if len(known) == len(chosen) else "")
        rows.append(row)
    return publishing.markdown_table(header, rows)


def cell(values: Sequence[float]) -> str:
    """A mean, and its spread if there is more than one seed."""
    if not values:
        return ""
    spread = f"±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def main() -> int:
    """Print both tables."""
    scores = published()
    for models, tasks in TABLES:
        Console().print(table(scores, models, tasks) + "\n", markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
