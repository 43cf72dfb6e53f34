"""Budgets that `light: auto` finds, beside the cost of every budget: the verdict on one grid after another.

    python benchmarks/found_budgets.py configs/glue/budgets.results.json configs/movie_reviews/auto.results.json

Reads results of `lightpeft reproduce` whose methods are "nothing cut", "auto" and budgets such as "40%"; nothing is
run. Of each model and task it says what budgets cost against nothing cut, which ones were found, what those were
expected to cost and did, and the budget of an oracle: the largest one up to which all that were tried, and the straight
lines between them, stay within the tolerance. Costs are in points of the task's metric, or in nats a token.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import plots
import publishing
from rich.console import Console

from lightpeft.app.runs.reproduce import Results, Row, read_results
from lightpeft.app.runs.reproduce.grid import cell_name
from lightpeft.app.runs.reproduce.results import CellReport
from lightpeft.budget.search import BudgetSearch, Probed
from lightpeft.errors import LightPeftError, require
from lightpeft.files import write_json

DENSE, AUTO = "nothing cut", "auto"
STEP = 0.05
"""Between budgets that `auto` and the oracle choose from."""


@dataclass(frozen=True)
class Found:
    """One run of `auto`."""

    seed: int
    blocks: float
    """The budget it found."""
    again: float
    """The budget that today's search finds by the same probes."""
    expected: float | None
    """Its cost as the run expected it; None where nothing was cut."""
    cost: float
    """Its cost in the end, against nothing cut with the same seed."""


@dataclass(frozen=True)
class Pair:
    """A model and a task."""

    model: str
    task: str
    metric: str
    unit: str
    tolerance: float
    """The largest cost that is allowed, in the unit."""
    dense: float
    """Nothing cut: mean of the metric."""
    costs: dict[float, list[float]]
    """Budget -> what it costs, seed by seed."""
    found: list[Found]

    @property
    def cost(self) -> float:
        """Of what was found, in the mean."""
        return statistics.fmean(found.cost for found in self.found)

    @property
    def oracle(self) -> float:
        """The largest budget within the tolerance by what was tried."""
        known = [(0.0, 0.0), *((blocks, statistics.fmean(costs)) for blocks, costs in sorted(self.costs.items()))]
        within = 0.0
        for step in range(1, round(known[-1][0] / STEP) + 1):
            if _between(known, step * STEP) > self.tolerance:
                break
            within = step * STEP
        return within


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """The value at `x` of straight lines through points."""
    for (left, low), (right, high) in pairwise(points):
        if x <= right + 1e-9:
            return low + (high - low) * (x - left) / (right - left)
    return math.inf


def pairs_of(results: Results) -> Iterator[Pair]:
    """The pairs of a grid that have results of nothing cut, `auto` and some budget."""
    by_pair: dict[tuple[str, str], dict[str, Row]] = {}
    for row in results.rows:
        by_pair.setdefault((row.model, row.task), {})[row.method] = row
    for rows in by_pair.values():
        budgets = [name for name in rows if name.endswith("%")]
        if {DENSE, AUTO} <= rows.keys() and budgets:
            yield _pair(results, rows, budgets)


def _pair(results: Results, rows: Mapping[str, Row], budgets: Sequence[str]) -> Pair:
    dense = rows[DENSE]
    reports = {method: _reports(results, row) for method, row in rows.items()}
    told = {seed: report["budget"] for seed, report in reports[AUTO].items()}
    # what the tolerance was given in: points of the task's metric, or nats of its loss
    in_points = all(budget["points_per_nat"] for budget in told.values())
    metric, factor = (dense.metric, 100.0) if in_points else ("loss", -1.0)

    def costs(method: str) -> dict[int, float]:
        whole, own = ({seed: r["metrics"][metric] for seed, r in reports[name].items()} for name in (DENSE, method))
        return {seed: factor * (whole[seed] - value) for seed, value in own.items() if seed in whole}

    worth = {seed: budget["points_per_nat"] if in_points else 1.0 for seed, budget in told.items()}
    found = [
        Found(
            seed,
            told[seed]["blocks"],
            again(told[seed]),
            told[seed]["expected"] and told[seed]["expected"]["left"] * worth[seed],
            cost,
        )
        for seed, cost in costs(AUTO).items()
    ]
    return Pair(
        model=dense.model,
        task=dense.task,
        metric=metric,
        unit="points" if in_points else "nats",
        tolerance=statistics.median(round(told[seed]["tolerance"] * worth[seed], 6) for seed in told),
        dense=statistics.fmean(report["metrics"][metric] for report in reports[DENSE].values()),
        costs={float(name[:-1]) / 100: list(costs(name).values()) for name in sorted(budgets)},
        found=found,
    )


def _reports(results: Results, row: Row) -> dict[int, CellReport]:
    return {seed: results.reports[cell_name(row.model, row.task, row.method, seed)] for seed in row.seeds}


# -- what is shown -----------------------------------------------------------------------------------------------------


def again(budget: CellReport) -> float:
    """The budget that today's search finds by the probes that one has recorded."""
    search = BudgetSearch({each["blocks"]: each["rise"] for each in budget["before"]}, budget["tolerance"])
    search.probed = [Probed(**each) for each in budget["probed"]]
    return search.found if search.probed else 0.0


def table(pairs: Sequence[Pair]) -> str:
    """A row for each pair."""
    budgets = sorted({blocks for pair in pairs for blocks in pair.costs})
    header = ("model, task", "nothing cut", *(f"{blocks:.0%}" for blocks in budgets))
    return publishing.markdown_table(
        (*header, "may cost", "found, seed by seed", "expected", "costs", "the oracle's"),
        [
            (
                f"{pair.model}, {pair.task}",
                f"{pair.dense * 100:.1f}" if pair.unit == "points" else f"{pair.dense:.3f}",
                *(_mean(pair.costs.get(blocks, []), pair.unit) for blocks in budgets),
                f"{pair.tolerance:g}",
                ", ".join(f"{found.blocks:.0%}" for found in pair.found),
                _mean([found.expected or 0.0 for found in pair.found], pair.unit, error=False),
                _mean([found.cost for found in pair.found], pair.unit),
                f"{pair.oracle:.0%}",
            )
            for pair in pairs
        ],
    )


def _mean(values: Sequence[float], unit: str, error: bool = True) -> str:
    """Mean and standard error; "-" of nothing."""
    if not values:
        return "-"
    digits = 1 if unit == "points" else 3
    text = f"{statistics.fmean(values) + 0.0:.{digits}f}"
    if not error or len(values) < 2:
        return text
    return f"{text} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def verdict(pairs: Sequence[Pair]) -> str:
    """How often what was found keeps within its tolerance, and how far it is from the oracle."""
    within = sum(pair.cost <= pair.tolerance for pair in pairs)
    runs = [(pair, found) for pair in pairs for found in pair.found]
    singly = sum(found.cost <= pair.tolerance for pair, found in runs)
    near = sum(
        abs(statistics.fmean(found.blocks for found in pair.found) - pair.oracle) <= 0.1 + 1e-9 for pair in pairs
    )
    then, now = (statistics.fmean(values) for values in zip(*((f.blocks, f.again) for _, f in runs), strict=True))
    return (
        f"In the mean over seeds {within} of {len(pairs)} pairs are within their tolerance, and {singly} of "
        f"{len(runs)} single runs; {near} of {len(pairs)} are within 10 points of budget of the oracle. "
        f"They found {then:.1%} in the mean; today's search finds {now:.1%} by the same probes."
    )


def panels(pairs: Sequence[Pair]) -> list[plots.CostPanel]:
    """A plot for each pair."""
    return [
        plots.CostPanel(
            title=f"{pair.model}, {pair.task}",
            y_label=f"lost, {pair.unit} ({pair.metric})",
            tried={0.0: [0.0], **pair.costs},
            found=[(found.blocks, found.cost) for found in pair.found],
            tolerance=pair.tolerance,
        )
        for pair in pairs
    ]


def main(arguments: list[str] | None = None) -> int:
    """Read and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.json of grids")
    parser.add_argument("--out", type=Path, help="JSON file for every number; the plot goes beside it, as PNG")
    given = parser.parse_args(arguments)
    try:
        pairs = [pair for path in given.results for pair in pairs_of(read_results(path))]
        require(bool(pairs), f'none of these files has results of "{DENSE}", "{AUTO}" and a budget such as "40%"')
        if given.out is not None:
            numbers = [{**asdict(pair), "oracle": pair.oracle} for pair in pairs]
            write_json(given.out, {"pairs": numbers, "command": publishing.command("found_budgets", arguments)})
            plots.costs(panels(pairs)).savefig(given.out.with_suffix(".png"), dpi=110)
    except LightPeftError as error:
        publishing.say(f"found_budgets: {error}")
        return 2
    Console().print(table(pairs), "", verdict(pairs), sep="\n", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
