"""lightpeft beside other ways of fine-tuning, on one config and over seeds: quality, parameters, time and memory.

    python benchmarks/peers.py configs/movie_reviews/minilm_default.yaml --seeds 0 1 2

All methods get the same data, padding, batches by length, batch size, data type, epochs, seeds and schedule. Every
(method, seed) is a cell of a grid (docs/how-to/grids.md), in a process of its own; finished cells stay in the output
folder and are not repeated, and one that fails is reported while the others go on. Speeds are measured last, in
alternation. Writes peers.results.json, peers.md, peers.png and peers.svg beside the grid's own table. Paths inside the
config are relative to the current folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import peer_tables
import plots
import publishing
from peer_cells import CURVE
from peer_methods import BASELINE, PEERS, own_settings, shared_settings
from peer_pruning import Goal, goal_of
from peer_speeds import Speeds
from publishing import say
from rich.console import Console
from transformers import set_seed

from lightpeft.app.cli.command import quiet
from lightpeft.app.folders.metrics_file import read_report
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.reproduce import Cell, Grid, reproduce
from lightpeft.app.runs.reproduce.running import run_cell
from lightpeft.app.runs.reproduce.saving import factored
from lightpeft.config import load_config, merge_settings
from lightpeft.errors import LightPeftError, require
from lightpeft.files import file_checksum, read_json, write_json, write_text
from lightpeft.profiling.surroundings import hardware

POINT = 0.01
"""One point of accuracy."""
NEVER = 10**9
"""Steps between checkpoints: a stage that is cut short starts again, and saving is no part of any method's time."""


@dataclass(frozen=True)
class Options:
    """The options of the command line, checked."""

    config: Path
    seeds: Sequence[int]
    peers: Sequence[str]
    out: Path
    rounds: int
    steps: int
    together: int
    curve: int
    learning_rates: Mapping[str, float]
    finished_only: bool
    command: str


def main(arguments: list[str] | None = None, launch: Callable[..., str | None] = run_cell) -> int:
    """Run, measure and write; 0 if all went well, 1 if a cell failed, 2 on bad input.

    Args:
        launch: how a cell is run, as `run_cell` does.
    """
    given = parser().parse_args(arguments)
    quiet()
    try:
        options = options_of(given, publishing.command("peers", arguments))
        goal = goal_of_config(options)
        grid = grid_of(options)
        cells = grid.cells(options.out)
        speeds = Speeds(options.out / "speeds", options.rounds, options.steps, options.together, goal)
        failures: Mapping[str, str] = {}
        if not options.finished_only:
            failures = reproduce(
                grid, options.out, devices=1, launch=partial(_launch, launch, goal, options.curve)
            ).failures
            speeds.measure({name: of_peer[0].config for name, of_peer in finished(cells).items()})
        results = summary(options, goal, finished(cells), speeds, failures)
        require(BASELINE in results["methods"], f"{options.out} has no finished cell of plain LoRA")
        write(results, options.out)
        if given.write_readme:
            publish(results, options)
    except LightPeftError as error:
        say(f"peers: {error}")
        return 2
    Console(width=200).print(peer_tables.markdown(results), markup=False)
    return 1 if results["failures"] else 0


# -- what is asked for -------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="METHOD")
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
    parser.add_argument("--finished-only", action="store_true", help="run nothing: results of the cells that are there")
    publishing.add_option(parser)
    return parser


def options_of(given: argparse.Namespace, command: str) -> Options:
    """The options, checked.

    Raises:
        LightPeftError: one makes no sense.
    """
    require(given.rounds >= 0 and given.steps >= 1, "--rounds starts at 0 and --steps at 1")
    require(given.together >= 2, "--together starts at 2: plain LoRA and one other")
    require(given.curve >= 0, "--curve starts at 0")
    chosen = [name for name in PEERS if name in given.methods or name == BASELINE]
    rates = dict(value.partition("=")[::2] for value in given.learning_rate)
    unknown = ", ".join(sorted({*rates} - {*chosen}))
    require(not unknown, f"--learning-rate names {unknown}, which is not among the methods that run")
    try:
        numbers = {name: float(value) for name, value in rates.items()}
    except ValueError as error:
        raise LightPeftError(f"--learning-rate: {error}") from error
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
        given.finished_only,
        command,
    )


# -- the grid ----------------------------------------------------------------------------------------------------------


def goal_of_config(options: Options) -> Goal:
    """How much whatever is pruned before training has to lose: as much as the light run of the config."""
    config = replace(load_config(options.config), method="light", output=str(options.out / "none"))
    set_seed(config.seed)
    return goal_of(pipeline.prepare(config).dense_model(), config.light)


def grid_of(options: Options) -> Grid:
    """All methods on the one config."""
    config = load_config(options.config)
    arms = {name: PEERS[name].arm(_own(options, name)) for name in options.peers}
    return Grid(
        name=str(options.config),
        models={options.config.stem: {}},
        tasks={config.data.task: {}},
        arms=arms,
        seeds=options.seeds,
        baseline=BASELINE,
        command=options.command,
        run=merge_settings(shared_settings(options.config), {"training": {"save_steps": NEVER}}),
    )


def _launch(run: Callable[..., str | None], goal: Goal, curve: int, cell: Cell, devices: int, log: Path) -> str | None:
    """Run a cell; `peer_cells` does where it is not `lightpeft run` alone."""
    if PEERS[cell.method].make is None and not curve:
        return run(cell, devices, log)
    arguments = {"peer": cell.method, "goal": asdict(goal), "curve": curve}
    return run(cell, devices, log, ["peer_cells", str(cell.run.path), json.dumps(arguments)])


def _own(options: Options, name: str) -> dict[str, Any]:
    """Settings of one method, from its config and the options."""
    settings = own_settings(options.config, name)
    rate = options.learning_rates.get(name)
    return settings if rate is None else merge_settings(settings, {"training": {"learning_rate": rate}})


def finished(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells that are done, by method.

    Raises:
        LightPeftError: one was made with other settings.
    """
    for cell in cells:
        RunFolder.open(cell.config)
    done = [cell for cell in cells if cell.run.has("evaluate")]
    return {name: [cell for cell in done if cell.method == name] for name in dict.fromkeys(c.method for c in done)}


# -- results -----------------------------------------------------------------------------------------------------------


def summary(
    options: Options, goal: Goal, found: Mapping[str, Sequence[Cell]], speeds: Speeds, failures: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that was found, over seeds, and every cell."""
    cells = {name: {cell.seed: numbers(cell, goal) for cell in of_peer} for name, of_peer in found.items()}
    settings, own = factored(
        {cell.name: read_report(cell.run.metrics)["config"] for of in found.values() for cell in of}
    )
    return {
        "config": str(options.config),
        "metric": next((cell["metric"] for of_peer in cells.values() for cell in of_peer.values()), None),
        "methods": {
            name: {
                "label": PEERS[name].label,
                "kind": PEERS[name].kind,
                **over_seeds(of_peer, cells.get(BASELINE, {})),
                "speed": speeds.found(name),
            }
            for name, of_peer in cells.items()
        },
        "failures": {**failures, **speeds.failures},
        "seeds": list(options.seeds),
        "goal": asdict(goal),
        "settings": settings,
        "cells": {
            name: [{**cells[name][cell.seed], "settings": own[cell.name]} for cell in of_peer]
            for name, of_peer in found.items()
        },
        "hardware": hardware(),
        "command": options.command,
        "logs": {f"{name}/{cell.seed}": file_checksum(cell.run.log) for name in found for cell in found[name]},
    }


def numbers(cell: Cell, goal: Goal) -> dict[str, Any]:
    """The numbers of a finished cell that are compared."""
    report, file = read_report(cell.run.metrics), cell.run.path / CURVE
    curve: dict[str, Any] = read_json(file) if file.is_file() else {"points": [], "spent": 0.0, "lasted": 0.0}
    seconds = {stage: value for stage, value in report["seconds"].items() if stage != "evaluate"}
    seconds["train"] -= curve["spent"]
    total = sum(seconds.values())
    sizes = report["parameters"]
    removed = goal.base - sizes["base"]
    return {
        "method": cell.method,
        "seed": cell.seed,
        "metric": report["main_metric"],
        "quality": report["metrics"][report["main_metric"]],
        "metrics": report["metrics"],
        "parameters": {
            "trained": sizes["trained"] - goal.head,
            "head": goal.head,
            "removed": removed,
            "removed_of_blocks": removed / goal.blocks,
            "removed_of_all": removed / goal.base,
        },
        "seconds": {**seconds, "total": total},
        "curve": [[total - curve["lasted"] + second, quality] for second, quality in curve["points"]],
        "adapter_bytes": report["adapter_bytes"],
        "settings": report["config"],
    }


def over_seeds(cells: Mapping[int, dict[str, Any]], baseline: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
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


def write(results: dict[str, Any], out: Path) -> None:
    """The results as JSON, Markdown and plots."""
    write_json(out / "peers.results.json", results, publishing.LINES)
    write_text(out / "peers.md", peer_tables.markdown(results) + "\n")
    plots.save(peer_tables.plot(results), out / "peers")


def publish(results: dict[str, Any], options: Options) -> None:
    """Results and plot beside README.md, and the table in it."""
    name = options.config.stem
    png, svg = plots.save(peer_tables.plot(results), publishing.beside(f"{name}.peers"))
    svg.unlink()
    numbers = f"{name}.peers.results.json"
    text = f"![quality against time and against inference speed]({png.name})\n\n{peer_tables.markdown(results)}"
    publishing.publish(f"peers {name}", text, numbers, results)


if __name__ == "__main__":
    sys.exit(main())
