"""The cost of a cut by the size of the model: results of grids and loss curves in one figure, extended to 7 billion.

    python benchmarks/sizes.py configs/scale/generation.results.json configs/scale/choice.results.json \
        --curves runs/scale/curves/*

Reads results of `lightpeft reproduce` whose methods are "no cut" or "lora", and cuts such as "20% of the blocks", and
run folders with a loss curve (`lightpeft plan --curve`), or the curves of an earlier sizes.json; nothing is run. Costs
are in nats a token against "no cut", or in points of the task's metric against "lora". A straight line through the
sizes, in logarithms of parameters and costs, is extrapolated to 7 billion, and drawn dotted there. Where a cost is not
above 0, the line is in logarithms of the parameters alone, and needs three sizes. The paper's claim is no cost at 40%
from 1.3 billion parameters on. Writes sizes.json, sizes.md, sizes.png and sizes.svg into --out.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import plots
import publishing
from rich.console import Console

from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs.reproduce import Results, Row, read_results
from lightpeft.errors import LightPeftError, require
from lightpeft.files import read_json, write_json, write_text
from lightpeft.plans.estimation_record import EstimationRecord

LARGEST = 7e9
CURVE = "SocialIQA, right after the cut"
MODELS = {
    "smollm2": "SmolLM2-135M",
    "qwen_0.5b": "Qwen2.5-Coder-0.5B",
    "qwen2.5_coder_0.5b": "Qwen2.5-Coder-0.5B",
    "qwen_1.5b": "Qwen2.5-Coder-1.5B",
    "qwen2.5_coder_1.5b": "Qwen2.5-Coder-1.5B",
}
TASKS = {
    "gsm8k": "GSM8K, 640 rows, trained",
    "640 rows": "GSM8K, 640 rows, trained",
    "2560 rows": "GSM8K, 2,560 rows, trained",
    "200 rows": "SST-2, 200 rows, trained",
    "1000 rows": "SST-2, 1,000 rows, trained",
    "arc_easy": "ARC-Easy, trained",
    "openbookqa": "OpenBookQA, trained",
    "socialiqa": "SocialIQA, trained",
    "sst2": "SST-2, trained",
    "banking77": "BANKING77, trained",
}
"""Names in grids and of folders -> those in the table."""


@dataclass(frozen=True)
class Cost:
    """One cut of one model on one task."""

    task: str
    unit: str
    """nats, or points of a metric."""
    model: str
    parameters: float
    """Of the whole base."""
    blocks: float
    """Part of the blocks' parameters that was removed."""
    cost: float
    """Mean over seeds; below 0: the cut was better."""
    low: float
    high: float
    """Loss curves: 95% interval. Nats: range of the seeds. Points: that range, and the 95% interval by test rows."""
    seeds: int


def costs_of(results: Results) -> Iterator[Cost]:
    """Every cut of a grid, against the same seeds of "no cut" (nats) or "lora" (points)."""
    by_name = {(row.model, row.task, row.method): row for row in results.rows}
    for row in results.rows:
        blocks = row.method.partition("% of the blocks")
        base = by_name.get((row.model, row.task, "no cut" if row.metric == "perplexity" else "lora"))
        if blocks[1] and base is not None:
            yield from _cost(row, base, float(blocks[0]) / 100, results)


def _cost(row: Row, base: Row, blocks: float, results: Results) -> Iterator[Cost]:
    nats = row.metric == "perplexity"
    own, dense = (dict(zip(r.seeds, map(math.log, r.quality) if nats else r.quality, strict=True)) for r in (row, base))
    seeds = sorted(own.keys() & dense.keys())
    found = [own[s] - dense[s] if nats else 100 * (dense[s] - own[s]) for s in seeds]
    if not found:
        return
    mean = statistics.fmean(found)
    # all seeds answer the same test rows, so more of them do not make the rows' error smaller
    half = 0.0 if nats else statistics.fmean(_half(row, base, seed, results) for seed in seeds)
    low, high = min(*found, mean - half), max(*found, mean + half)
    size = base.measures["parameters"]
    if size is not None:
        task, model = TASKS.get(row.task, row.task), MODELS.get(row.model, row.model)
        yield Cost(task, "nats" if nats else "points", model, size.mean, blocks, mean, low, high, len(found))


def _half(row: Row, base: Row, seed: int, results: Results) -> float:
    """Half of the 95% interval of the cost by test rows, in points."""
    ends = [results.reports["/".join((r.model, r.task, r.method, str(seed)))] for r in (row, base)]
    (a, b), (c, d) = (report["intervals"][row.metric] for report in ends)
    return 100 * math.hypot((b - a) / 2, (d - c) / 2)


def curve_of(folder: Path) -> Iterator[Cost]:
    """The budgets of a run's loss curve, or all curves of an earlier sizes.json."""
    if folder.suffix == ".json":
        yield from (Cost(**each) for each in read_json(folder)["costs"] if each["task"] == CURVE)
        return
    run = RunFolder.at(folder)
    require(run.curve.is_file(), f"{folder} has no loss curve; run `lightpeft plan --curve --run {folder}` first")
    record = EstimationRecord.load(run.estimation)
    base = record.base_parameters
    for point in read_json(run.curve)["points"]:
        low, high = point["interval"]
        yield Cost(
            CURVE, "nats", MODELS.get(folder.name, folder.name), base, point["blocks"], point["rise"], low, high, 1
        )


@dataclass(frozen=True)
class Trend:
    """A straight line through the sizes at one budget."""

    slope: float
    start: float
    logarithmic: bool
    """True if the cost is in logarithms, too."""

    def at(self, parameters: float) -> float:
        """The cost of a model of this size."""
        value = self.start + self.slope * math.log(parameters)
        return math.exp(value) if self.logarithmic else value


def trend(points: Sequence[Cost]) -> Trend | None:
    """By least squares; None: fewer than two sizes, or fewer than three where a cost is not above 0."""
    logarithmic = all(point.cost > 0 for point in points)
    if len({point.parameters for point in points}) < (2 if logarithmic else 3):
        return None
    x = np.log([point.parameters for point in points])
    y = np.array([point.cost for point in points])
    slope, start = np.polyfit(x, np.log(y) if logarithmic else y, 1)
    return Trend(float(slope), float(start), logarithmic)


def by_task(costs: Iterable[Cost]) -> dict[str, dict[float, list[Cost]]]:
    """Task -> budget -> the sizes, smallest first."""
    found: dict[str, dict[float, list[Cost]]] = defaultdict(lambda: defaultdict(list))
    for cost in sorted(costs, key=lambda each: (each.blocks, each.parameters)):
        found[cost.task][cost.blocks].append(cost)
    return found


def markdown(costs: Sequence[Cost]) -> str:
    """A row for each task and budget, a column for each model, and the extrapolation to 7 billion."""
    sizes = dict(sorted({cost.model: cost.parameters for cost in costs}.items(), key=lambda each: each[1]))
    header = ["", "removed", *(f"{model} ({size / 1e9:.2f}B)" for model, size in sizes.items()), "7B, extrapolated"]
    rows = []
    for task, budgets in by_task(costs).items():
        for blocks, points in budgets.items():
            of_model = {point.model: point for point in points}
            cells = [_text(of_model[model]) if model in of_model else "" for model in sizes]
            line = trend(points)
            at_largest = "" if line is None else f"{line.at(LARGEST):.3g}"
            rows.append([f"{task}, {points[0].unit}", f"{100 * blocks:.0f}%", *cells, at_largest])
    return publishing.markdown_table(header, rows)


def _text(cost: Cost) -> str:
    digits = 3 if cost.unit == "nats" else 1
    return f"{cost.cost:.{digits}f} ({cost.low:.{digits}f} to {cost.high:.{digits}f})"


def panels(costs: Sequence[Cost], budgets: Sequence[float]) -> Iterator[plots.SizePanel]:
    """One a task, if it was run at several sizes; of all tasks if none was."""
    tasks = by_task(costs)
    several = {task: of for task, of in tasks.items() if any(len(points) > 1 for points in of.values())}
    for task, of_task in (several or tasks).items():
        lines, extrapolated = {}, {}
        for blocks, points in of_task.items():
            if blocks in budgets:
                name = f"{100 * blocks:.0f}%"
                lines[name] = [(each.parameters, each.cost, each.low, each.high) for each in points]
                if (line := trend(points)) is not None:
                    last = points[-1].parameters
                    extrapolated[name] = [(size, line.at(size)) for size in np.geomspace(last, LARGEST, 20).tolist()]
        unit = next(iter(of_task.values()))[0].unit
        label = "nats per token" if unit == "nats" else "points lost"
        yield plots.SizePanel(task, label, lines, extrapolated, claimed=task != CURVE)


def main(arguments: list[str] | None = None) -> int:
    """Read, compare and draw; 0, or 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="results of `lightpeft reproduce`")
    parser.add_argument(
        "--curves",
        nargs="*",
        default=[],
        type=Path,
        metavar="RUN",
        help="run folders named like a model, or a sizes.json",
    )
    parser.add_argument("--drawn", nargs="+", type=float, default=[0.1, 0.2, 0.4, 0.6], help="budgets of the figure")
    parser.add_argument("--out", type=Path, default=Path("runs/scale/sizes"))
    given = parser.parse_args(arguments)
    try:
        grids = [read_results(file) for file in given.results]
        costs = [cost for grid in grids for cost in costs_of(grid)]
        costs = [*(cost for folder in given.curves for cost in curve_of(folder)), *costs]
        require(costs, "nothing to compare: no results with a cut beside no cut or lora, and no --curves")
        command = publishing.command("sizes", arguments)
        processors = sorted({report["hardware"]["cpu"] for grid in grids for report in grid.reports.values()})
        found = {"command": command, "processors": processors, "costs": [asdict(cost) for cost in costs]}
        write_json(given.out / "sizes.json", found, 2)
        write_text(given.out / "sizes.md", markdown(costs) + "\n")
        Console().print(markdown(costs), markup=False, soft_wrap=True)
        plots.save(plots.sizes([*panels(costs, given.drawn)], LARGEST), given.out / "sizes")
    except LightPeftError as error:
        publishing.say(f"sizes: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
