"""The time of an answer in ONNX Runtime for everything that grids have published results of, and its figure.

    OMP_NUM_THREADS=1 python benchmarks/latency.py configs/frontier/minilm.yaml --task sst2 cola

Latency depends on shapes alone, and the shapes of a cut are known when estimation ends. So each model is estimated as
the grid's first seed is, one estimation for all budgets, and cut; nothing is trained to its end. These and the whole
models are written for ONNX Runtime in float32 and int8, and all of a task answer the same test rows on one thread, one
and 32 at a time, in alternating rounds. Quality is that of the grids' results files. Writes latency.json, latency.md,
latency.png and latency.svg into --out, where a second call finds what was estimated and measured.

With new seeds, `--known benchmarks/latency.json` measures nothing: quality is that of the grids now, latencies are
those of the file, and shapes that it lacks are named and left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import frontier
import publishing
import serving
import torch

from lightpeft.adapters.merging import merged_copy
from lightpeft.app.exports.graphs.runtimes import RUNTIMES
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.reproduce import Row, load_grid, read_results
from lightpeft.app.runs.reproduce.grid import Cell, slug
from lightpeft.app.runs.reuse import estimation_settings
from lightpeft.app.runs.stages import estimated_model
from lightpeft.app.runs.workspace import Workspace
from lightpeft.errors import LightPeftError, require
from lightpeft.files import read_json, write_json, write_text
from lightpeft.models.loading import quiet_libraries
from lightpeft.plans.planning import make_plan
from lightpeft.profiling.comparing import summarize
from lightpeft.profiling.surroundings import hardware
from lightpeft.recipe.pruner import cut


@dataclass(frozen=True)
class Published:
    """A row of a grid's results, and the cell of its first seed."""

    row: Row
    cell: Cell

    @property
    def shape(self) -> str:
        """Name of the shapes, on which its latency depends; whole models are alike, however they were trained."""
        return f"{self.row.model}, {self.row.method}" if is_cut(self.cell) else self.row.model

    def is_in(self, known: Mapping[str, Any]) -> bool:
        """True if its shape was measured on its task."""
        return self.shape in known.get(self.row.task, {})

    def point(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """A point as `frontier.written`: quality and, of its shape, MiB, and ms a row with the quartiles of rounds."""
        row = self.row
        point = {name: getattr(row, name) for name in ("task", "model", "metric", "seeds")}
        point |= {"method": method_name(row.method), "quality": statistics.fmean(row.quality), "by_seed": row.quality}
        return point | {"shape": self.shape} | known[row.task][self.shape]


def is_cut(cell: Cell) -> bool:
    """True if something of the blocks is removed."""
    return cell.config.method_spec.prunes and cell.config.light.cuts_blocks


def method_name(method: str) -> str:
    """A grid's method as `frontier.py` names it, from its folder."""
    return slug(method).replace("_", " ")


def in_figure(point: Mapping[str, Any]) -> bool:
    """True for the arms that the figure has a line for; single trials are in latency.json alone."""
    each = frontier.Point(point["task"], point["model"], point["method"])
    if each.cut:
        return each.part > 0 and each.kind in frontier.KIND_NAMES
    return each.method in frontier.NAMES


def published(grids: Sequence[Path], tasks: Sequence[str], out: Path) -> Iterator[Published]:
    """All rows of the grids' results on these tasks."""
    for file in grids:
        cells = {(c.model, c.task, c.method, c.seed): c for c in load_grid(file).cells(out / file.stem)}
        for row in read_results(file.with_suffix(".results.json")).rows:
            if row.task in tasks:
                yield Published(row, cells[row.model, row.task, row.method, row.seeds[0]])


def opened(cell: Cell, estimated: dict[str, Workspace]) -> tuple[Any, Any, Any]:
    """The model of a cell, whole or cut but not trained, its tokenizer, and what makes batches.

    Args:
        estimated: runs with an estimation, by the settings that it depends on; this cell's is added if it is not there.
    """
    work = pipeline.prepare(cell.config)
    if is_cut(cell):
        settings = json.dumps(estimation_settings(cell.config), sort_keys=True, default=str)
        donor = estimated.setdefault(settings, work)
        plan = make_plan(pipeline.estimate(donor), cell.config.light)
        model = merged_copy(cut(estimated_model(donor, plan), plan))
    else:
        model = work.dense_model().model
    return model, work.tokenizer, lambda size: [*serving.batched(work, size)]


def measured(found: Sequence[Published], given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By task and shape."""
    known: dict[str, dict[str, Any]] = {}
    for task in given.task:
        estimated: dict[str, Workspace] = {}
        openers = {each.shape: partial(opened, each.cell, estimated) for each in found if each.row.task == task}
        timed = frontier.latencies(task, openers, given)
        known[task] = {shape: summary(values) for shape, values in timed.items()}
    return known


def summary(timed: Mapping[str, Any]) -> dict[str, Any]:
    """Medians and quartiles of a shape's rounds in ms a row, and its MiB."""
    spreads = {way: summarize(values) for way, values in timed["values"].items()}
    quartiles = {way: [spread.low, spread.high] for way, spread in spreads.items()}
    return {"ms": timed["ms"], "quartiles": quartiles, "mib": timed["mib"]}


def remembered(file: Path, tasks: Sequence[str]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What an earlier latency.json has: latencies by task and shape, as `measured`; its hardware and command.

    Raises:
        LightPeftError: the file is missing or damaged, or is not from this script.
    """
    earlier, known = read_json(file), defaultdict[str, dict[str, Any]](dict)
    require("measured_by" in earlier, f"{file} is no latency.json of this script")
    for point in earlier["points"]:
        if point["task"] in tasks:
            known[point["task"]][point["shape"]] = {name: point[name] for name in ("ms", "quartiles", "mib")}
    return known, {name: earlier[name] for name in ("hardware", "measured_by")}


def markdown(known: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for each task, one row for each shape."""
    return "\n\n".join(_table(task, shapes) for task, shapes in known.items())


def _table(task: str, shapes: Mapping[str, Any]) -> str:
    one, many = frontier.SIZES
    names = {dtype: dtype.replace("f32", "float32") for dtype in frontier.DTYPES}
    header = [f"ms a text, {frontier.TITLES.get(task, task)}, ONNX Runtime"]
    header += [*(f"{name}: {one}, {many}" for name in names.values()), f"MiB: {', '.join(names.values())}"]
    rows = []
    for shape, found in shapes.items():
        model, comma, method = shape.partition(", ")
        name = frontier.named(model) + (f", {frontier.named(method_name(method))}" if comma else "")
        ms = [", ".join(f"{found['ms'][f'{dtype} {size}']:.1f}" for size in (one, many)) for dtype in names]
        rows.append([name, *ms, ", ".join(f"{found['mib'][dtype]:.0f}" for dtype in names)])
    return publishing.markdown_table(header, rows)


def main(arguments: list[str] | None = None) -> int:
    """Estimate, cut, measure and write; 0, or 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", nargs="+", type=Path, help="YAML files of grids, with results files beside them")
    parser.add_argument("--task", nargs="+", required=True, help="tasks of the grids")
    frontier.add_options(parser)
    parser.add_argument("--known", type=Path, help="latency.json of an earlier call, to measure nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/frontier/latency"))
    given = parser.parse_args(arguments)
    quiet_libraries()
    try:
        publishing.check_counts(given, "rounds", "rows")
        found = [*published(given.grids, given.task, given.out)]
        lacking = ", ".join(task for task in given.task if task not in {each.row.task for each in found})
        require(not lacking, f"no results of {lacking} beside {', '.join(map(str, given.grids))}")
        frontier.check_figure(given, [*dict.fromkeys(each.row.task for each in found)])
        command = publishing.command("latency", arguments)
        if given.known is None:
            serving.check(RUNTIMES["onnx"])
            torch.set_num_threads(1)
            known, source = measured(found, given), {"hardware": hardware(), "measured_by": command}
        else:
            known, source = remembered(given.known, given.task)
        points = [each.point(known) for each in found if each.is_in(known)]
        left_out = [f"{each.row.task}, {each.shape}" for each in found if not each.is_in(known)]
        lack = f"{given.known} has no latency of {'; '.join(dict.fromkeys(left_out))}"
        require(points, lack)
        if left_out:
            publishing.say(f"latency: {lack}; they are left out")
        write_json(given.out / "latency.json", {"points": points, **source, "command": command}, 2)
        write_text(given.out / "latency.md", markdown(known) + "\n")
        drawn = [point for point in points if in_figure(point)]
        frontier.draw(frontier.shown_by_task(drawn, given.way), given, given.out / "latency")
    except LightPeftError as error:
        publishing.say(f"latency: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
