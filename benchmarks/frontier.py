"""The frontier of quality against latency: cuts of larger models beside smaller models, on what was run for them.

    OMP_NUM_THREADS=1 python benchmarks/frontier.py runs/frontier/minilm runs/frontier/mpnet runs/frontier/wnut17

Reads the finished cells in the output folders of `lightpeft reproduce` (configs/frontier), `finegates.py` and
`wnut17.py`. Every cell's model answers all test rows once (answers.json in its folder), the first seed's in int8, too.
Models of equal shapes take equally long: one of each is written for ONNX Runtime in float32 and int8, and all of a task
answer the same rows on one thread, one and 32 at a time, in alternating rounds. Differences are paired by test row: of
a cut to its own model with all weights or LoRA, and to each smaller model of the cut whose latency is nearest (float32,
one row). Writes frontier.results.json, frontier.md, frontier.png and frontier.svg into --out.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import finegates
import plots
import publishing
import row_counts
import serving
import torch
import wnut17
from peft import PeftModel

from lightpeft.adapters.merging import merged_copy
from lightpeft.app.exports.graphs import sessions
from lightpeft.app.exports.graphs.exporting import write_graph
from lightpeft.app.exports.graphs.runtimes import RUNTIMES
from lightpeft.app.exports.graphs.tracing import make_traceable
from lightpeft.app.folders.opening import open_result
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.reproduce.results import MEASURES
from lightpeft.errors import LightPeftError, require
from lightpeft.files import read_json, write_json, write_text
from lightpeft.models.loading import quiet_libraries
from lightpeft.profiling.comparing import alternate
from lightpeft.profiling.sizes import folder_bytes
from lightpeft.profiling.surroundings import hardware

DTYPES, SIZES = ("f32", "int8"), (1, 32)
WAYS = [f"{dtype} {size}" for dtype in DTYPES for size in SIZES]
"""Data type, and rows at a time."""
COUNTED = {"accuracy": row_counts.right, "matthews": row_counts.confusion}
MEASURED = ("seconds", "peak_memory_bytes", "parameters", "removed", "trained")
NAMES = {
    "minilm": "MiniLM-L6",
    "minilm_l3": "MiniLM-L3",
    "mpnet": "MPNet-base",
    "full": "all weights",
    "full smoothed": "all weights, smoothed labels",
    "lora": "LoRA",
    "lora on all projections": "LoRA on all projections",
}
"""How the figure names models and methods; folders of demo/siblings.py are named by their first layers."""
FIRST = "first layers, all weights"
KIND_NAMES = {
    "lora": "LoRA",
    "all": "all weights",
    "all, taught": "all weights, taught",
    "all tokens of the task": "all weights, the task's tokens",
}
TITLES = {"movie_reviews": "movie reviews", "sst2": "SST-2", "cola": "CoLA", "rte": "RTE"}
TITLES |= {"banking77": "BANKING77", "wnut17": "WNUT-17"}
METRIC_NAMES = {"matthews": "Matthews correlation", "entity_f1": "entity F1"}


@dataclass
class Point:
    """One model, trained in one way, on one task."""

    task: str
    model: str
    method: str
    metric: str = ""
    shape: str = ""
    """Name of the shapes of its weights, on which its latency depends; of the first seed."""
    counts: dict[int, Any] = field(default_factory=dict)
    """By seed."""
    int8: dict[int, float] = field(default_factory=dict)
    """Quality in int8, by seed."""
    measures: dict[str, list[float]] = field(default_factory=dict)
    ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds a row by data type and rows at a time, as "f32 1"."""
    mib: dict[str, float] = field(default_factory=dict)

    @property
    def cut(self) -> bool:
        """True if it was trained as lightpeft trains a cut; of 0% is the whole model."""
        return self.method[0].isdigit()

    @property
    def part(self) -> int:
        """Per cent of the blocks that lightpeft removed."""
        return int(self.method.split()[0]) if self.cut else 0

    @property
    def kind(self) -> str:
        """How what is left of a cut was trained."""
        return self.method.lstrip("0123456789 ") or "lora"

    @property
    def quality(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def values(self) -> list[float]:
        """Quality by seed."""
        return [row_counts.value(self.metric, counts) for counts in self.counts.values()]


# -- cells -------------------------------------------------------------------------------------------------------------


def opened(folder: Path) -> tuple[Any, Any, Any, Any, str]:
    """Of a finished cell: merged model, tokenizer, what makes batches, what counts answers, and the metric."""
    report = read_json(folder / "metrics.json")
    if report["main_metric"] == wnut17.METRIC:
        return *wnut17.opened(folder, Path(report["config"]["data"]["path"])), wnut17.METRIC
    run = RunFolder.at(folder)
    work = pipeline.prepare(run.config)
    model = finegates.reopened(run, work) if "finegates" in report else open_result(run, work.task)
    whole = merged_copy(model) if isinstance(model, PeftModel) else model
    metric = work.task.main_metric
    return whole, work.tokenizer, lambda size: [*serving.batched(work, size)], COUNTED[metric], metric


def exported(model: Any, tokenizer: Any, dtype: str, folder: Path) -> sessions.Session:
    """The model in ONNX Runtime."""
    folder.mkdir()
    write_graph(make_traceable(model), tokenizer, RUNTIMES["onnx"], folder, dtype)
    return sessions.load("onnx", folder)


def answered(folder: Path, in_int8: bool) -> dict[str, Any]:
    """Answers of a cell's model, asked once: metric, shape, and counts by data type."""
    file = folder / "answers.json"
    found: dict[str, Any] = read_json(file) if file.is_file() else {"counts": {}}
    if not set(DTYPES[: 1 + in_int8]) <= set(found["counts"]):
        model, tokenizer, batches, counted, metric = opened(folder)
        shapes = str([tuple(p.shape) for p in model.parameters()])
        found |= {"metric": metric, "shape": hashlib.sha256(shapes.encode()).hexdigest()[:16]}
        with TemporaryDirectory() as place:
            ways = {"f32": partial(serving.in_pytorch, make_traceable(model))}
            if in_int8:
                ways["int8"] = partial(serving.in_runtime, exported(model, tokenizer, "int8", Path(place) / "graph"))
            for dtype, answer in ways.items():
                rows = [row for each in batches(SIZES[-1]) for row in counted(answer(each), each["labels"]).tolist()]
                found["counts"][dtype] = rows
        write_json(file, found)
    return found


def points_of(folders: Sequence[Path]) -> tuple[list[Point], dict[tuple[str, str], Path]]:
    """All that was run, and a cell of every task and shape of a point."""
    points: dict[tuple[str, ...], Point] = {}
    shapes: dict[tuple[str, str], Path] = {}
    for file in (file for folder in folders for file in sorted(folder.glob("cells/*/*/*/*/metrics.json"))):
        model, task, method, seed = file.parent.relative_to(file.parents[4]).parts
        report = read_json(file)
        taught = ", taught" if report["config"]["training"].get("teacher") else ""
        name = f"{method.replace('_', ' ')}{taught}"
        point = points.setdefault((task, model, name), Point(task, model, name))
        found = answered(file.parent, in_int8=not point.counts)
        point.metric, point.shape = found["metric"], point.shape or found["shape"]
        point.counts[int(seed)] = found["counts"]["f32"]
        if "int8" in found["counts"]:
            point.int8[int(seed)] = row_counts.value(point.metric, found["counts"]["int8"])
        for measure in MEASURED:
            if (value := MEASURES[measure](report)) is not None:
                point.measures.setdefault(measure, []).append(value)
        if point.shape == found["shape"]:
            shapes.setdefault((task, point.shape), file.parent)
    require(points, f"no finished cell in {', '.join(map(str, folders))}")
    return [*points.values()], shapes


# -- latency -----------------------------------------------------------------------------------------------------------


Opener = Callable[[], tuple[Any, ...]]
"""Returns a model, its tokenizer and what makes batches, as `opened` does."""


def timed(openers: Mapping[str, Opener], rounds: int, rows: int) -> dict[str, dict[str, Any]]:
    """By shape: milliseconds a row and MiB of files of one task's models, in alternating rounds."""
    subjects: dict[tuple[str, str], Any] = {}
    found: dict[str, dict[str, Any]] = {shape: {"mib": {}, "ms": {}, "values": {}} for shape in openers}
    with TemporaryDirectory() as place:
        for shape, opener in openers.items():
            model, tokenizer, batched, *_ = opener()
            given = {size: batched(size)[: -(-rows // size)] for size in SIZES}
            for dtype in DTYPES:
                graph = Path(place) / f"{shape}-{dtype}"
                session = exported(model, tokenizer, dtype, graph)
                found[shape]["mib"][dtype] = folder_bytes(graph) / 2**20
                for size, inputs in given.items():
                    way, answer = f"{dtype} {size}", partial(serving.in_runtime, session)
                    subjects[shape, way] = partial(serving.once, answer, inputs)
        for (shape, way), values in alternate(subjects, rounds).items():
            found[shape]["values"][way], found[shape]["ms"][way] = values, statistics.median(values)
    return found


def latencies(task: str, openers: Mapping[str, Opener], given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By shape, as `timed`; measured only if not all of them were measured together, and in this way, before."""
    file, counts = given.out / f"latency.{task}.json", {"rounds": given.rounds, "rows": given.rows}
    known: dict[str, Any] = read_json(file) if file.is_file() else {}
    if not (counts.items() <= known.items() and openers.keys() <= known["shapes"].keys()):
        known = {**counts, "shapes": timed(openers, given.rounds, given.rows)}
        write_json(file, known)
    return {shape: known["shapes"][shape] for shape in openers}


def add_latency(points: Sequence[Point], shapes: Mapping[tuple[str, str], Path], given: argparse.Namespace) -> None:
    """Latencies and sizes of every point."""
    for task in dict.fromkeys(point.task for point in points):
        known = latencies(task, {s: partial(opened, cell) for (t, s), cell in shapes.items() if t == task}, given)
        for point in points:
            if point.task == task:
                point.ms, point.mib = known[point.shape]["ms"], known[point.shape]["mib"]


# -- what it comes to --------------------------------------------------------------------------------------------------


def comparisons(points: Sequence[Point]) -> Iterator[dict[str, Any]]:
    """Every cut beside its own model whole and by FineGates, and every smaller model beside the cuts of its latency."""
    for cut in (point for point in points if point.cut):
        whole = {p.method: p for p in points if (p.task, p.model) == (cut.task, cut.model)}
        peers = ["full", "lora", *(["full smoothed"] if cut.kind.startswith("all") else [])]
        peers += ["full, taught"] if cut.method.endswith(", taught") else []
        peers += [name for name in whole if name.startswith(f"FineGates {cut.method[:2]}")]
        yield from (_compared(cut, whole[method]) for method in peers if method in whole)
    dense = [point for point in points if not point.cut and not point.method.startswith("FineGates")]
    for small in dense:
        larger: dict[tuple[str, str], list[Point]] = defaultdict(list)
        for cut in points:
            full = next((p.ms["f32 1"] for p in dense if (p.task, p.model) == (small.task, cut.model)), 0.0)
            if cut.part and cut.task == small.task and cut.model != small.model and full > small.ms["f32 1"]:
                larger[cut.model, cut.kind].append(cut)
        for cuts in larger.values():
            yield _compared(min(cuts, key=lambda cut: abs(math.log(cut.ms["f32 1"] / small.ms["f32 1"]))), small)


def _compared(cut: Point, other: Point) -> dict[str, Any]:
    difference = row_counts.paired(cut.metric, other.counts, cut.counts)
    return {
        "task": cut.task,
        "cut": f"{cut.model}, {cut.method}",
        "other": f"{other.model}, {other.method}",
        "of_its_latency": cut.ms["f32 1"] / other.ms["f32 1"],
        "difference": None if difference is None else asdict(difference),
    }


def markdown(results: Mapping[str, Any]) -> str:
    """One row a point, and one a comparison."""
    header = ["task", "model, method", "seeds", "quality", "in int8", *(f"ms a row, {way}" for way in WAYS)]
    header += [f"MiB, {dtype}" for dtype in DTYPES] + ["removed, %", "trained", "training, s", "peak, MiB"]
    rows = []
    for point in results["points"]:
        of = defaultdict(lambda: math.nan, {name: statistics.fmean(all_) for name, all_ in point["measures"].items()})
        row = [point["task"], f"{point['model']}, {point['method']}", f"{len(point['by_seed'])}"]
        row += [_cell(point), f"{100 * statistics.fmean(point['int8'].values()):.1f}"]
        row += [f"{point['ms'][way]:.2f}" for way in WAYS] + [f"{point['mib'][dtype]:.0f}" for dtype in DTYPES]
        row += [f"{100 * of['removed']:.0f}", f"{of['trained']:,.0f}"]
        rows.append([*row, f"{of['seconds']:.0f}", f"{of['peak_memory_bytes'] / 2**20:.0f}"])
    text = publishing.markdown_table(header, rows)
    header = ["task", "cut", "beside", "of its latency", "points", "95% interval", "p", "seeds"]
    rows = []
    for each in results["comparisons"]:
        names = [each["task"], each["cut"], each["other"], f"{each['of_its_latency']:.2f}"]
        if (d := each["difference"]) is not None:
            interval = f"{100 * d['low']:+.1f} to {100 * d['high']:+.1f}"
            rows.append([*names, f"{100 * d['mean']:+.1f}", interval, f"{d['p']:.3f}", f"{d['seeds']}"])
    return f"{text}\n\n{publishing.markdown_table(header, rows)}"


def _cell(point: Mapping[str, Any]) -> str:
    seeds = point["by_seed"]
    spread = f" ± {100 * statistics.stdev(seeds):.1f}" if len(seeds) > 1 else " (1)"
    return f"{100 * point['quality']:.1f}{spread}"


@dataclass(frozen=True)
class Shown:
    """A point as the figure needs it, or all points of a model that was trained in one way."""

    point: Point
    ms: float
    by_seed: dict[int, float]
    """Per cent; those of all tasks for the seeds that they share."""
    quality: float
    """Mean, per cent."""


def named(name: str) -> str:
    """A model or method as tables and figure have it."""
    part, _, kind = name.partition(" ")
    if part.isdigit():
        return f"{part}% cut, {KIND_NAMES.get(kind or 'lora', kind)}"
    untaught, comma, taught = name.partition(", ")
    whole, first, layers = untaught.partition("_first")
    return NAMES.get(whole, whole) + (f", first {layers} layers" if first else "") + comma + taught


def panels(shown: Mapping[str, Sequence[Shown]]) -> Iterator[plots.FrontierPanel]:
    """The mean of all tasks, of what was run on all of them, and one a task."""
    mean, *names = titles([*shown])
    if len(shown) > 1:
        yield panel(mean, "mean", [*means(shown)])
    for name, of_task in zip(names, shown.values(), strict=True):
        metric = of_task[0].point.metric
        yield panel(name, METRIC_NAMES.get(metric, metric), of_task)


def titles(tasks: Sequence[str]) -> list[str]:
    """Titles of the panels: of the mean, which is not there of one task alone, and of every task."""
    return [f"mean of {len(tasks)} tasks", *(TITLES.get(task, task) for task in tasks)]


def written(point: Point) -> dict[str, Any]:
    """A point as the results file has it."""
    found = asdict(point) | {"counts": None, "quality": point.quality}
    return found | {"seeds": list(point.counts), "by_seed": point.values}


def shown_by_task(points: Sequence[Mapping[str, Any]], way: str) -> dict[str, list[Shown]]:
    """Written points that were measured in this way, as the figure needs them, by task."""
    by_task: dict[str, list[Shown]] = defaultdict(list)
    for each in points:
        point = Point(each["task"], each["model"], each["method"], each["metric"])
        by_seed = {seed: 100 * value for seed, value in zip(each["seeds"], each["by_seed"], strict=True)}
        by_task[point.task].append(Shown(point, each["ms"][way], by_seed, 100 * each["quality"]))
    return dict(by_task)


def means(shown: Mapping[str, Sequence[Shown]]) -> Iterator[Shown]:
    """Means over all tasks, of latency and quality, of what was run on all of them."""
    found: dict[tuple[str, str], list[Shown]] = defaultdict(list)
    for each in (each for of_task in shown.values() for each in of_task):
        found[each.point.model, each.point.method].append(each)
    for of_all in found.values():
        if len(of_all) == len(shown):
            seeds = set.intersection(*({*each.by_seed} for each in of_all))
            by_seed = {seed: statistics.fmean(each.by_seed[seed] for each in of_all) for seed in sorted(seeds)}
            ms, quality = (statistics.fmean(getattr(each, name) for each in of_all) for name in ("ms", "quality"))
            yield Shown(of_all[0].point, ms, by_seed, quality)


def way_of(point: Point) -> tuple[str, str, str]:
    """The whole model behind a point, how it was trained, and what the figure writes beside it."""
    source, _, layers = point.model.partition("_first")
    if layers:
        return named(source), FIRST, layers
    if point.method.startswith("FineGates"):
        name, part, *recipe = point.method.split()
        return named(source), " ".join([name, *recipe]), f"{part}%"
    if point.part:
        return named(source), KIND_NAMES.get(point.kind, point.kind), f"{point.method.split()[0]}%"
    return named(source), named(point.method), ""


def panel(title: str, measure: str, shown: Sequence[Shown]) -> plots.FrontierPanel:
    """Whole models with all weights trained as marks; a line for each way, which begins at the whole model."""
    marks, lines = [], defaultdict(list)
    for each in shown:
        model, kind, label = way_of(each.point)
        lines[model, kind].append((each.ms, each.quality, label))
        if (kind, label) == (NAMES["full"], ""):
            values = [each.quality, *each.by_seed.values()]
            marks.append(
                plots.Point(model, "plain", each.ms, each.quality, (each.ms, each.ms), (min(values), max(values)))
            )
            lines[model, FIRST].append((each.ms, each.quality, ""))
    ways = {way: sorted(line) for way, line in lines.items() if way[1] != FIRST or len(line) > 1}
    return plots.FrontierPanel(title, f"{measure}, %", marks, ways)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of measuring latencies and of the figure."""
    parser.add_argument("--rounds", type=int, default=9, help="alternations")
    parser.add_argument("--rows", type=int, default=192, help="test rows a round")
    about = 'data type and rows at a time of the figure (default: "f32 1")'
    parser.add_argument("--way", choices=WAYS, default=WAYS[0], help=about)
    parser.add_argument("--figure", nargs="+", default=[], metavar="TITLE", help="panels of the figure (default: all)")


def check_figure(given: argparse.Namespace, tasks: Sequence[str]) -> None:
    """Check the panels that were asked for, before anything is measured.

    Raises:
        LightPeftError: no panel has one of the titles.
    """
    known = titles(tasks)[len(tasks) < 2 :]
    wrong = " or ".join(title for title in given.figure if title not in known)
    require(not wrong, f"--figure: no panel is called {wrong}; there are: {', '.join(known)}")


def draw(shown: Mapping[str, Sequence[Shown]], given: argparse.Namespace, stem: Path) -> None:
    """Write the figure."""
    drawn = [each for each in panels(shown) if each.title in (given.figure or [each.title])]
    dtype, _, size = given.way.partition(" ")
    label = f"ms a text in ONNX Runtime, {dtype.replace('f32', 'float32')}, {size} at a time"
    plots.save(plots.frontier(drawn, label), stem)


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0, or 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders")
    add_options(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/frontier"))
    given = parser.parse_args(arguments)
    quiet_libraries()
    try:
        publishing.check_counts(given, "rounds", "rows")
        serving.check(RUNTIMES["onnx"])
        torch.set_num_threads(1)
        points, shapes = points_of(given.runs)
        check_figure(given, [*dict.fromkeys(point.task for point in points)])
        add_latency(points, shapes, given)
        shown = [written(point) for point in points]
        results = {"points": shown, "comparisons": [*comparisons(points)], "hardware": hardware()}
        results["command"] = publishing.command("frontier", arguments)
        write_json(given.out / "frontier.results.json", results, 2)
        write_text(given.out / "frontier.md", markdown(results) + "\n")
        draw(shown_by_task(shown, given.way), given, given.out / "frontier")
    except LightPeftError as error:
        publishing.say(f"frontier: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
