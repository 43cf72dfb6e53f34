"""Plain LoRA, estimation and light on a CUDA device: training, inference and peak memory of large models, bfloat16.

    python benchmarks/gpu.py --shapes roberta-large llama-1b --quality configs/movie_reviews/minilm_default.yaml

Models have the shapes of RoBERTa-large and of Llama 3 with 1 to 8 billion parameters, and random weights. Times are
taken with CUDA events, in processes of their own and in alternation; memory is the peak of the CUDA allocator. Random
weights cannot say which quality goes with a speed. Whole runs of real models can: with `--quality`, configs are run
plain and light, for one epoch in bfloat16, on the device that is there. Ends at once where there is no CUDA device.
`--device cpu --shapes roberta-tiny llama-tiny` tries the script out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from publishing import add_option, check_counts, command, markdown_table, publish, say, spread_text
from rich.console import Console
from subjects import with_settings
from synthetic import SUBJECTS, Case, Shape, measure

from lightpeft.app.cli.command import quiet
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.workers import Worker
from lightpeft.config import RunConfig, fill_defaults, light_config, load_config, override_light
from lightpeft.errors import LightPeftError, require
from lightpeft.files import write_json, write_text
from lightpeft.profiling.surroundings import hardware

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("roberta-large", "roberta", 1024, 24, 16, 16, 4096, 50265),
        Shape("llama-1b", "llama", 2048, 16, 32, 8, 8192, 128256),
        Shape("llama-3b", "llama", 3072, 28, 24, 8, 8192, 128256),
        Shape("llama-8b", "llama", 4096, 32, 32, 8, 14336, 128256),
        Shape("roberta-tiny", "roberta", 32, 2, 4, 4, 64, 96),
        Shape("llama-tiny", "llama", 32, 2, 4, 2, 64, 96),
    )
}
LABELS = {"plain": "plain LoRA", "estimation": "estimation", "light": "light"}
METHODS = ("plain", "light")
"""The runs of `--quality`."""


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well or there is no GPU, 1 if a shape or a run failed, 2 on bad input."""
    given = _parser().parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        say("gpu: no CUDA device here, nothing was measured; --device cpu --shapes roberta-tiny tries the script out")
        return 0
    quiet()
    failures: dict[str, str] = {}
    try:
        check_counts(given, "rounds", "steps", "batch", "length")
        require(given.shapes or given.quality, "nothing to measure; give --shapes, --quality or both")
        results = [*_done(given.shapes, lambda name: _measure(name, given), failures).values()]
        configs = {path.stem: path for path in given.quality}
        quality = _done(configs, lambda name: _run(configs[name], given), failures)
        require(results or quality, f"nothing could be measured: {'; '.join(failures.values())}")
        machine = hardware()
        report = {"shapes": results, "quality": quality, "failures": failures, "hardware": machine}
        report["command"] = command("gpu", arguments)
        write_json(given.out / "gpu.results.json", report)
        text = "\n\n".join(([_table(results)] if results else []) + ([_quality_table(quality)] if quality else []))
        write_text(given.out / "gpu.md", text + "\n")
        if given.write_readme:
            about = f"{text}\n\n{machine['gpu'] or machine['cpu']}, torch {machine['torch']}."
            publish("gpu", about, "gpu.results.json", report)
    except LightPeftError as error:
        say(f"gpu: {error}")
        return 2
    Console(width=160).print(text, markup=False)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["roberta-large", "llama-1b", "llama-3b", "llama-8b"]
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=default, metavar="SHAPE")
    parser.add_argument("--quality", nargs="+", type=Path, default=[], metavar="CONFIG", help="runs, plain and light")
    parser.add_argument("--limit", type=int, help="rows that these train on; all if not given")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batch", type=int, default=8, help="rows a batch")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--rounds", type=int, default=5, help="alternations of the subjects")
    parser.add_argument("--steps", type=int, default=10, help="batches a round")
    parser.add_argument("--light", type=float, default=0.6, help="part of the blocks to cut")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    add_option(parser)
    return parser


def _measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
    say(f"measuring {name}")
    light = override_light(fill_defaults(light_config(given.light)), {"estimate": {"length": 2}})
    case = Case(SHAPES[name], given.batch, given.length, given.steps, light, given.device, bf16=True)
    return measure(case, SUBJECTS, given.rounds)


def _done(names: Iterable[str], measure: Callable[[str], Any], failures: dict[str, str]) -> dict[str, Any]:
    """Measurements by name; one that fails is reported and noted."""
    done = {}
    for name in names:
        try:
            done[name] = measure(name)
        except LightPeftError as error:
            failures[name] = str(error)
            say(f"{name}: {error}")
    return done


class Run:
    """One run in a process of its own, so that each has to warm up the device."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def report(self) -> dict[str, Any]:
        """The content of metrics.json."""
        return pipeline.run(self.config, overwrite=True)


def _run(path: Path, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The reports of a config's runs, by method."""
    settings = {"training.epochs": 1, "training.precision": "bf16"}
    limit = {} if given.limit is None else {"data.limit_train": given.limit}
    config = with_settings(load_config(path), settings | limit)
    reports = {}
    for method in METHODS:
        say(f"running {path.stem}, {method}")
        of_method = {"method": method, "output": str(given.out / path.stem / method)}
        with Worker(Run, with_settings(config, of_method)) as worker:
            reports[method] = worker.measure("report")
    return reports


def _quality_table(quality: dict[str, dict[str, dict[str, Any]]]) -> str:
    header = ("run", "", "quality", "95%", "fine-tuning, samples/s", "to the adapter, s", "peak memory, MiB")
    rows = []
    for name, reports in quality.items():
        for method, report in reports.items():
            metric, train = report["main_metric"], report["training"]["train"]
            low, high = report["intervals"][metric]
            seconds = sum(value for stage, value in report["seconds"].items() if stage != "evaluate")
            peak = max(stage["peak_memory_bytes"] for stage in report["training"].values())
            cells = (f"{metric} {report['metrics'][metric]:.1%}", f"{low:.1%}-{high:.1%}")
            speed = (f"{train['samples_per_second']:,.0f}", f"{seconds:,.1f}", f"{peak / 2**20:,.0f}")
            rows.append([name, LABELS[method], *cells, *speed])
    return markdown_table(header, rows)


def _table(results: Sequence[dict[str, Any]]) -> str:
    header = (
        "model",
        "",
        "base removed",
        "training, ms a step",
        "speed-up",
        "ideal",
        "inference, ms a batch",
        "speed-up",
        "ideal",
        "peak memory, MiB",
    )
    return markdown_table(header, [_row(result, name) for result in results for name in result["subjects"]])


def _row(result: dict[str, Any], name: str) -> list[str]:
    subject, cells = result["subjects"][name], [result["case"]["shape"]["name"], LABELS[name]]
    cells.append(f"{subject['removed_ratio']:.1%}" if name == "light" else "-")
    for what in ("training", "inference"):
        seconds = subject[f"{what}_seconds"]
        cells.append(f"{seconds['median'] * 1000:,.1f}" if seconds else "-")
        cells.append(spread_text(subject[f"{what}_speedup"]) if seconds and name != "plain" else "-")
        cells.append(f"{result['ideal'][what]:.2f}" if name == "light" else "-")
    return [*cells, f"{subject['peak_memory_bytes'] / 2**20:,.0f}"]


if __name__ == "__main__":
    sys.exit(main())
