"""lightpeft beside other ways of fine-tuning, on one config and over seeds: quality, parameters, time and memory.

    python benchmarks/peers.py configs/movie_reviews/minilm_default.yaml --seeds 0 1 2

All methods get the same data, padding, batches by length, batch size, data type, epochs, seeds and schedule. Every
(method, seed) is a cell; finished cells are kept in the output folder and not repeated, and one that fails is reported
while the others go on. Speeds are measured last, in processes of their own, in alternation. Writes
peers.results.json, peers.md, peers.png and peers.svg. Paths inside the config are relative to the current folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import plots
import publishing
from matplotlib.figure import Figure
from peer_methods import BASELINE, Method, light_config, methods, with_settings
from peer_pruning import goal_of
from publishing import markdown_table
from rich.console import Console
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from lightpeft.cli.command import quiet
from lightpeft.config import RunConfig, load_config
from lightpeft.console.bars import showing, silent
from lightpeft.errors import LightPeftError, require
from lightpeft.evaluation.scores import evaluate
from lightpeft.files import read_json, write_json
from lightpeft.machine import autocast_dtype
from lightpeft.models.task_heads import CAUSAL_LM
from lightpeft.profiling import alternate, count_parameters, folder_bytes, hardware, ratio, summarize
from lightpeft.runs import pipeline
from lightpeft.runs.bench import Build, Subject, Worker
from lightpeft.runs.pipeline import Workspace
from lightpeft.saved.light_adapter import LightModel
from lightpeft.saved.results import save_peft
from lightpeft.training.trainer import fit, make_trainer

POINT = 0.01
"""One point of accuracy."""
INFERENCE_BATCHES = (1, 32)
"""Rows a batch in the measurement of inference."""
NEVER = 10**9
"""Steps between checkpoints: a cell that is cut short starts again, and saving is no part of any method's time."""


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    config: Path
    seeds: Sequence[int]
    methods: Sequence[str]
    out: Path
    rounds: int
    steps: int
    together: int
    curve: int
    learning_rates: Mapping[str, float]
    light_files: Mapping[str, Path]
    finished_only: bool
    metric: str = "accuracy"


def main(arguments: list[str] | None = None) -> int:
    """Run, measure and write; 0 if all went well, 1 if a cell failed, 2 on bad input."""
    given = _parser().parse_args(arguments)
    quiet()
    try:
        options = _options(given)
        suite = Suite(options)
        if not options.finished_only:
            suite.run_cells()
            suite.measure_speeds()
        results = suite.results()
        require(BASELINE in results["methods"], f"{options.out} has no finished cell of plain LoRA")
        write(results, options.out)
        if given.write_readme:
            publish(results, options)
    except LightPeftError as error:
        _say(f"peers: {error}")
        return 2
    Console(width=200).print(markdown(results), markup=False)
    return 1 if suite.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = methods()
    parser.add_argument("config", type=Path, help="YAML file of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(known), default=list(known), metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=7, help="alternations of the speed measurement; 0: none")
    parser.add_argument("--steps", type=int, default=12, help="batches a round")
    parser.add_argument("--together", type=int, default=5, help="measuring processes at once, plain LoRA included")
    parser.add_argument("--out", type=Path, help="folder of cells and results (default: runs/peers/<config's name>)")
    parser.add_argument(
        "--curve",
        type=int,
        default=0,
        metavar="POINTS",
        help="evaluate on the test rows at so many points of training (not counted as time), for the time to a quality",
    )
    parser.add_argument(
        "--learning-rate",
        nargs="+",
        default=[],
        metavar="METHOD=VALUE",
        help="other learning rates than the config's, or the method's own",
    )
    parser.add_argument(
        "--light-config", nargs="+", default=[], metavar="PRESET=FILE", help="a config of its own for a preset"
    )
    parser.add_argument("--finished-only", action="store_true", help="run nothing: results of the cells that are there")
    publishing.add_option(parser)
    return parser


def _options(given: argparse.Namespace) -> Options:
    require(given.rounds >= 0 and given.steps >= 1, "--rounds starts at 0 and --steps at 1")
    require(given.together >= 2, "--together starts at 2: plain LoRA and one other")
    require(given.curve >= 0, "--curve starts at 0")
    chosen = [name for name in methods() if name in given.methods or name == BASELINE]
    rates = _pairs(given.learning_rate, "--learning-rate", chosen)
    try:
        numbers = {name: float(value) for name, value in rates.items()}
    except ValueError as error:
        raise LightPeftError(f"--learning-rate: {error}") from error
    files = _pairs(given.light_config, "--light-config", [name.removeprefix("light_") for name in chosen])
    return Options(
        given.config,
        given.seeds,
        chosen,
        given.out or Path("runs") / "peers" / given.config.stem,
        given.rounds,
        given.steps,
        given.together,
        given.curve,
        numbers,
        {name: Path(value) for name, value in files.items()},
        given.finished_only,
    )


def _pairs(values: Sequence[str], option: str, known: Sequence[str]) -> dict[str, str]:
    pairs = dict(value.partition("=")[::2] for value in values)
    unknown = sorted(set(pairs) - set(known))
    require(not unknown, f"{option} names {', '.join(unknown)}, which is not among the methods that run")
    return pairs


def _say(line: str) -> None:
    Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)


@dataclass
class Suite:
    """All cells of one comparison, on disk."""

    options: Options
    failures: dict[str, str] = field(default_factory=dict)
    """Cell or measurement -> why it failed."""

    def __post_init__(self) -> None:
        self.base = replace(load_config(self.options.config), method="light")
        set_seed(self.base.seed)
        work = pipeline.prepare(replace(self.base, output=str(self.options.out / "none")))
        self.goal = goal_of(pipeline.dense_model(work).model, self.base.light)

    # -- cells -----------------------------------------------------------------------------------------------------

    def run_cells(self) -> None:
        """Train and evaluate what is not done yet; every other seed goes through the methods backwards."""
        for index, seed in enumerate(self.options.seeds):
            for name in self.options.methods[:: -1 if index % 2 else 1]:
                if self.cell(name, seed) is None:
                    self._guard(f"{name}-{seed}", partial(self._run_cell, methods()[name], seed))

    def _guard(self, what: str, act: Callable[[], None]) -> None:
        """Do something that belongs to one method; when it fails, report it and go on."""
        try:
            act()
        except Exception as error:  # noqa: BLE001 - whatever another library raises is that method's result
            self.failures[what] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            _say(f"{what} failed: {self.failures[what]}")

    def cell(self, name: str, seed: int) -> dict[str, Any] | None:
        """A finished cell of these settings, or None.

        Raises:
            LightPeftError: it was made with other settings.
        """
        path = self._cell_path(name, seed)
        if not path.is_file():
            return None
        cell = read_json(path)
        same = cell["settings"] == self._settings(name, seed)
        require(same, f"{path} was made with other settings; give another --out, or delete it")
        return cell if cell["curve"] or not self.options.curve else None

    def _cell_path(self, name: str, seed: int) -> Path:
        return self.options.out / "cells" / f"{name}-{seed}.json"

    def _settings(self, name: str, seed: int) -> dict[str, Any]:
        """The cell's settings as JSON gives them back."""
        settings = {key: value for key, value in asdict(self.config(name, seed)).items() if key != "output"}
        return {**json.loads(json.dumps(settings)), "goal": json.loads(json.dumps(asdict(self.goal)))}

    def config(self, name: str, seed: int) -> RunConfig:
        """The run of one cell."""
        method = methods()[name]
        if method.kind == "light":
            preset = name.removeprefix("light_")
            config = light_config(self.options.config, preset, self.options.light_files.get(preset))
        else:
            config = with_settings(replace(self.base, method="plain"), method.settings)
        rate = self.options.learning_rates.get(name)
        own = {} if rate is None else {"training.learning_rate": rate}
        output = str(self.options.out / "runs" / f"{name}-{seed}")
        return with_settings(config, {**own, "training.save_steps": NEVER, "seed": seed, "output": output})

    def _run_cell(self, method: Method, seed: int) -> None:
        config = self.config(method.name, seed)
        shutil.rmtree(config.output, ignore_errors=True)
        _say(f"{method.name}, seed {seed}")
        work = pipeline.prepare(config)
        curve = Curve(partial(self._quality, work), self.options.curve)
        report = self._run_light(config, curve) if method.build is None else self._run_peer(method, work, curve)
        seconds = {stage: value for stage, value in report["seconds"].items() if stage != "evaluate"}
        seconds["train"] -= curve.spent
        before = sum(seconds.values()) - curve.lasted
        write_json(
            self._cell_path(method.name, seed),
            {
                "method": method.name,
                "seed": seed,
                "quality": report["metrics"][self.options.metric],
                "metrics": report["metrics"],
                "parameters": report["parameters"],
                "seconds": {**seconds, "total": sum(seconds.values())},
                "curve": [[before + second, quality] for second, quality in curve.points],
                "adapter_bytes": folder_bytes(work.run.adapter),
                "settings": self._settings(method.name, seed),
                "hardware": hardware(),
            },
        )

    def _quality(self, work: Workspace, model: nn.Module) -> float:
        return self._evaluate(work, model)[self.options.metric]

    def _evaluate(self, work: Workspace, model: nn.Module) -> dict[str, float]:
        training = work.config.training
        autocast = autocast_dtype(training)
        with showing(silent):
            return evaluate(model, work.test_rows, work.task, work.collator, training.eval_batch_size, autocast)

    def _run_light(self, config: RunConfig, curve: Curve) -> dict[str, Any]:
        with observed(curve):
            report = pipeline.run(config)
        sizes = report["parameters"]
        removed = sizes["base_dense"] - sizes["base"]
        return {**report, "parameters": self._sizes(sizes["peft"], sizes["head"], removed)}

    def _run_peer(self, method: Method, work: Workspace, curve: Curve) -> dict[str, Any]:
        assert method.build is not None
        config, run = work.config, work.run
        set_seed(config.seed)
        run.begin()
        loaded = pipeline.dense_model(work)
        head = sum(p.numel() for name in loaded.new_modules for p in loaded.model.get_submodule(name).parameters())
        model = method.build(work, loaded, self.goal)
        trainer = make_trainer(
            cast(Any, model),  # the whole model, without PEFT, in full fine-tuning
            work.train_rows,
            work.collator,
            config.training,
            stage="train",
            checkpoints=run.checkpoints("train"),
            log=run.log,
            steps=work.steps,
            seed=config.seed,
            token_loss=work.task.head == CAUSAL_LM,
            callbacks=[curve],
        )
        with method.accelerating(work, model):
            seconds = fit(trainer, None)
        run.finish_stage("train", seconds, partial(_save, model, run.adapter))
        count = count_parameters(model)
        sizes = self._sizes(count.trainable - head, head, self.goal.base - count.base)
        return {"metrics": self._evaluate(work, model), "parameters": sizes, "seconds": run.stage_seconds()}

    def _sizes(self, trained: int, head: int, removed: int) -> dict[str, Any]:
        return {
            "trained": trained,
            "head": head,
            "removed": removed,
            "removed_of_blocks": removed / self.goal.blocks,
            "removed_of_all": removed / self.goal.base,
        }

    # -- speed -----------------------------------------------------------------------------------------------------

    def measure_speeds(self) -> None:
        """Measure every method that has a finished cell, a few at a time, each time beside plain LoRA."""
        if not self.options.rounds or self._finished_seed(BASELINE) is None:
            return
        done = [name for name in self.options.methods if self._finished_seed(name) is not None]
        todo = [name for name in done if self.speed(name) is None]
        others = [name for name in todo if name != BASELINE]
        size = self.options.together - 1
        for start in range(0, max(len(others), len(todo)), size):
            group = [BASELINE, *others[start : start + size]]
            self._guard(f"speeds of {', '.join(group)}", partial(self._measure_group, group))

    def _finished_seed(self, name: str) -> int | None:
        return next((seed for seed in self.options.seeds if self.cell(name, seed) is not None), None)

    def _speed_path(self, name: str) -> Path:
        return self.options.out / "speeds" / f"{name}.json"

    def speed(self, name: str) -> dict[str, Any] | None:
        """A finished measurement, or None."""
        path = self._speed_path(name)
        if not path.is_file():
            return None
        speed = read_json(path)
        wanted = (self.options.rounds, self.options.steps)
        return speed if (speed["rounds"], speed["steps"]) == wanted or not self.options.rounds else None

    def _measure_group(self, names: Sequence[str]) -> None:
        _say(f"measuring {', '.join(names)}")
        with ExitStack() as stack:
            workers = {name: stack.enter_context(self._worker(name)) for name in names}
            fixed: dict[str, Any] = {}
            for name, worker in workers.items():
                self._guard(f"{name}-speed", lambda n=name, w=worker: fixed.update({n: w.measure("fixed")}))  # type: ignore[misc]
            alive = {name: worker for name, worker in workers.items() if name in fixed}
            if BASELINE not in alive:
                return
            rounds = self.options.rounds
            values = {"training": alternate({n: partial(w.measure, "training") for n, w in alive.items()}, rounds)}
            for size in INFERENCE_BATCHES:
                calls = {name: partial(worker.measure, "inference", size) for name, worker in alive.items()}
                values[f"inference_{size}"] = alternate(calls, rounds)
        for name in alive:
            if name != BASELINE or self.speed(name) is None:
                of_two = {what: {"own": v[name], "baseline": v[BASELINE]} for what, v in values.items()}
                counts = {"rounds": rounds, "steps": self.options.steps}
                write_json(self._speed_path(name), {**counts, "fixed": fixed[name], "values": of_two})

    def _worker(self, name: str) -> Worker:
        seed = self._finished_seed(name)
        assert seed is not None
        method = methods()[name]
        subject = "light" if method.kind == "light" else Build(partial(method.make, self.goal), method.accelerating)
        return Worker(Subject, subject, self.config(name, seed), self.options.steps)

    # -- results ---------------------------------------------------------------------------------------------------

    def results(self) -> dict[str, Any]:
        """Everything that was found, over seeds, and every cell."""
        cells = {
            name: {seed: cell for seed in self.options.seeds if (cell := self.cell(name, seed))}
            for name in self.options.methods
        }
        known = methods()
        return {
            "config": str(self.options.config),
            "metric": self.options.metric,
            "methods": {
                name: {
                    "label": known[name].label,
                    "kind": known[name].kind,
                    **_over_seeds(of_method, cells[BASELINE]),
                    "speed": _speeds(self.speed(name)),
                }
                for name, of_method in cells.items()
                if of_method
            },
            "failures": self.failures,
            "seeds": list(self.options.seeds),
            "goal": asdict(self.goal),
            "cells": {name: list(of_method.values()) for name, of_method in cells.items()},
            "hardware": hardware(),
        }


def _save(model: nn.Module, folder: Path) -> None:
    """A light adapter, an adapter as PEFT writes it, or a whole model."""
    if isinstance(model, LightModel) or hasattr(model, "peft_config"):
        save_peft(cast(Any, model), folder)
    else:
        cast(Any, model).save_pretrained(str(folder))


class Curve(TrainerCallback):
    """Quality at evenly spaced steps of the training it watches; the time of measuring is kept apart."""

    def __init__(self, measure: Callable[[nn.Module], float], points: int) -> None:
        self.measure, self.count = measure, points
        self.points: list[tuple[float, float]] = []
        """(seconds of training, quality)."""
        self.spent = 0.0
        """Seconds of measuring."""
        self.started = 0.0
        self.lasted = 0.0
        """Seconds of the whole training, without measuring."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        due = {round(state.max_steps * point / self.count) for point in range(1, self.count + 1)}
        if state.global_step in due:
            now = time.perf_counter()
            self.points.append((now - self.started - self.spent, self.measure(kwargs["model"])))
            self.spent += time.perf_counter() - now

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.lasted = time.perf_counter() - self.started - self.spent


def observed(curve: Curve) -> AbstractContextManager[Any]:
    """Let the curve watch the fine-tuning of `pipeline.run`, which makes its trainers itself."""
    make = vars(pipeline)["make_trainer"]

    def with_curve(*args: Any, **options: Any) -> Trainer:
        trainer = make(*args, **options)
        if options["stage"] == "train":
            trainer.add_callback(curve)
        return trainer

    return mock.patch.object(pipeline, "make_trainer", with_curve)


# -- over seeds ----------------------------------------------------------------------------------------------------


def _over_seeds(cells: Mapping[int, dict[str, Any]], baseline: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds; differences and times to a quality against plain LoRA's same seed."""
    shared = [seed for seed in cells if seed in baseline]
    watched = [seed for seed in shared if cells[seed]["curve"]]
    reached = [time_to(cells[seed]["curve"], baseline[seed]["quality"] - POINT) for seed in watched]
    times = [seconds for seconds in reached if seconds is not None]
    first = next(iter(cells.values()))
    return {
        "quality": spread([cell["quality"] for cell in cells.values()]),
        "difference": spread([cells[seed]["quality"] - baseline[seed]["quality"] for seed in shared]),
        "parameters": {
            name: statistics.mean(cell["parameters"][name] for cell in cells.values()) for name in first["parameters"]
        },
        "seconds": spread([cell["seconds"]["total"] for cell in cells.values()]),
        "seconds_before_training": spread([c["seconds"]["total"] - c["seconds"]["train"] for c in cells.values()]),
        "seconds_to_quality": {**spread(times), "reached": len(times), "of": len(reached)} if watched else None,
        "adapter_bytes": statistics.mean(cell["adapter_bytes"] for cell in cells.values()),
        "learning_rate": first["settings"]["training"]["learning_rate"],
        "seeds": list(cells),
    }


def time_to(curve: Sequence[Sequence[float]], quality: float) -> float | None:
    """Seconds at the first point of the curve that has the quality; None if there is none."""
    return next((seconds for seconds, reached in curve if reached >= quality), None)


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation; None of no values, 0 of one."""
    if not values:
        return {"mean": None, "std": None}
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def _speeds(speed: dict[str, Any] | None) -> dict[str, Any] | None:
    """Samples/s as medians with quartiles, and ratios to plain LoRA within rounds."""
    if speed is None:
        return None
    return {
        **{
            what: {
                "samples_per_second": asdict(summarize(values["own"])),
                "ratio": asdict(ratio(values["own"], values["baseline"])),
            }
            for what, values in speed["values"].items()
        },
        **speed["fixed"],
        "values": speed["values"],
    }


# -- tables and plots ----------------------------------------------------------------------------------------------


def write(results: dict[str, Any], out: Path) -> None:
    """The results as JSON, Markdown and plots."""
    write_json(out / "peers.results.json", results)
    (out / "peers.md").write_text(markdown(results) + "\n", encoding="utf-8")
    plots.save(plot(results), out / "peers")


def publish(results: dict[str, Any], options: Options) -> None:
    """Results, logs and plot beside README.md, and the table in it."""
    name = options.config.stem
    logs = publishing.beside(f"{name}.peers.logs")
    logs.mkdir(exist_ok=True)
    for run in (f"{method}-{cell['seed']}" for method, cells in results["cells"].items() for cell in cells):
        shutil.copy(options.out / "runs" / run / "log.jsonl", logs / f"{run}.jsonl")
    png, svg = plots.save(plot(results), publishing.beside(f"{name}.peers"))
    svg.unlink()
    numbers = f"{name}.peers.results.json"
    text = f"![quality against time and against inference speed]({png.name})\n\n{markdown(results)}"
    publishing.publish(f"peers {name}", f"{text}\n\nEvery number: [{numbers}]({numbers}).", numbers, results)


def markdown(results: dict[str, Any]) -> str:
    """Two tables: quality, sizes and times of the runs, and the alternating measurement of speed."""
    found: dict[str, dict[str, Any]] = results["methods"]
    several = any(method["seeds"] != results["seeds"] for method in found.values())
    runs = markdown_table(
        (
            "method",
            *(["seeds"] if several else []),
            f"{results['metric']}, %",
            "minus plain LoRA, points",
            "trained (head apart)",
            "removed of blocks",
            "of all",
            "end to end, s",
            "to LoRA's quality - 1 point, s",
            "saved, KiB",
        ),
        [_run_row(method, several) for method in found.values()],
    )
    speeds = markdown_table(
        ("method", "training samples/s", *(f"inference, batch {n}" for n in INFERENCE_BATCHES), "peak memory, MiB"),
        [_speed_row(method) for method in found.values() if method["speed"]],
    )
    machine = results["hardware"]
    note = (
        f"{len(results['seeds'])} seed(s), mean ± standard deviation; speeds are medians, in brackets the ratio to "
        "plain LoRA within rounds with its quartiles (methods are measured in groups: compare the ratios); "
        f"{machine['gpu'] or machine['cpu']}, "
        f"{machine['torch_threads']} thread(s)."
    )
    failed = "\n".join(f"- {what}: {why}" for what, why in results["failures"].items())
    return "\n\n".join(part for part in (runs, speeds, note, f"Failed:\n\n{failed}" if failed else "") if part)


def _run_row(method: dict[str, Any], with_seeds: bool) -> list[str]:
    sizes, goal = method["parameters"], method["seconds_to_quality"]
    return [
        method["label"],
        *([str(len(method["seeds"]))] if with_seeds else []),
        _mean(method["quality"], 100, 1),
        _mean(method["difference"], 100, 1, "+"),
        f"{sizes['trained']:,.0f} (+ {sizes['head']:,.0f})",
        f"{sizes['removed_of_blocks']:.1%}",
        f"{sizes['removed_of_all']:.1%}",
        _mean(method["seconds"], 1, 0),
        f"{_mean(goal, 1, 0)} ({goal['reached']}/{goal['of']})" if goal else "-",
        f"{method['adapter_bytes'] / 1024:,.0f}",
    ]


def _speed_row(method: dict[str, Any]) -> list[str]:
    speed = method["speed"]
    cells = [method["label"]]
    for what in ("training", *(f"inference_{size}" for size in INFERENCE_BATCHES)):
        of = speed[what]["ratio"]
        median = speed[what]["samples_per_second"]["median"]
        cells.append(f"{median:,.0f} ({of['median']:.2f}; {of['low']:.2f}-{of['high']:.2f})")
    return [*cells, f"{speed['peak_memory_bytes'] / 2**20:,.0f}"]


def _mean(values: Mapping[str, Any], factor: float, digits: int, sign: str = "") -> str:
    if values["mean"] is None:
        return "-"
    return f"{values['mean'] * factor:{sign}.{digits}f} ± {values['std'] * factor:.{digits}f}"


def plot(results: dict[str, Any]) -> Figure:
    """Quality against the time of a whole run, and against inference speed."""
    found: dict[str, dict[str, Any]] = results["methods"]
    by_time = [_point(method, *_around(method["seconds"])) for method in found.values()]
    size = INFERENCE_BATCHES[-1]
    by_speed = []
    for method in found.values():
        if method["speed"]:
            speed = method["speed"][f"inference_{size}"]["ratio"]
            by_speed.append(_point(method, speed["median"], (speed["low"], speed["high"])))
    quality = f"{results['metric']}, %"
    panels = [plots.Panel("a whole run, estimation included", "seconds (left is better)", quality, by_time)]
    if by_speed:
        label = "samples/s over those of plain LoRA (right is better)"
        panels.append(plots.Panel(f"inference, merged weights, batch {size}", label, quality, by_speed))
    title = f"{Path(results['config']).stem}, {len(results['seeds'])} seed(s); bars: standard deviation, quartiles"
    return plots.scatter(panels, title)


def _around(values: Mapping[str, float]) -> tuple[float, tuple[float, float]]:
    return values["mean"], (values["mean"] - values["std"], values["mean"] + values["std"])


def _point(method: dict[str, Any], x: float, x_range: tuple[float, float]) -> plots.Point:
    y, y_range = _around({name: 100 * value for name, value in method["quality"].items()})
    return plots.Point(method["label"], method["kind"], x, y, x_range, y_range)


if __name__ == "__main__":
    sys.exit(main())
