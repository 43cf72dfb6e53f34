"""Memory and computation that `lightpeft check` foretells, beside those that a run then takes.

    python benchmarks/needs.py configs/movie_reviews/minilm_default.yaml configs/glue/mpnet_sst2.yaml

Each config is checked, then estimated and cut, and its stages train for a few steps, the longest batch among them, in
processes of their own (`lightpeft bench`). Memory is compared beyond what the process has without a model: weights, and
the most that training adds to them. Prints a table and writes every number to --out. With `--dense`, the stages of the
whole model alone are measured, for models whose estimation takes long.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from publishing import check_counts, markdown_table, report

from lightpeft.app.cli.command import quiet
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.bench import bench
from lightpeft.app.runs.checking import check
from lightpeft.app.runs.subject import Subject
from lightpeft.app.runs.workers import Worker
from lightpeft.config import RunConfig, load_config
from lightpeft.profiling.rehearsal import Holding

SUBJECTS = {"plain": "plain", "estimate": "estimation", "train": "light"}
"""Stage of a check -> subject of a bench."""


def compare(path: Path, steps: int, dense: bool = False) -> dict[str, dict[str, float]]:
    """By stage: bytes and FLOPs that were foretold, and that were measured."""
    config = load_config(path)
    said = check(pipeline.prepare(config)).stages
    measured = of_dense(config, steps) if dense else bench(config, rounds=1, steps=steps)["subjects"]
    found = {}
    for stage, subject in SUBJECTS.items():
        if stage not in said or subject not in measured:
            continue
        holding, taken = said[stage].holding, measured[subject]
        outside = 0 if taken["peak_memory_method"] == "cuda" else resident(holding)
        found[stage] = {
            "said_bytes": holding.total,
            "measured_bytes": outside + taken["peak_memory_bytes"],
            "said_flops": holding.flops,
            "measured_flops": taken["flops"]["training"],
        }
    return found


def of_dense(config: RunConfig, steps: int) -> dict[str, dict[str, Any]]:
    """By subject: what training the whole model takes, with plain PEFT and in estimation."""
    found = {}
    for subject in ("plain", "estimation"):
        with Worker(Subject, subject, config, steps) as worker:
            found[subject] = worker.measure("fixed")
    return found


def resident(holding: Holding) -> int:
    """Bytes of a model before it trains: frozen weights, and about a third of what training keeps of the others."""
    return holding.weights + holding.trained // 3


def measure(paths: Sequence[Path], steps: int, dense: bool = False) -> dict[str, Any]:
    """The comparison by config."""
    return {str(path): compare(path, steps, dense) for path in paths}


def markdown(results: dict[str, Any]) -> str:
    """One row a stage."""
    rows = [
        [
            f"{Path(path).stem}, {stage}",
            f"{of['said_bytes'] / 2**20:,.0f}",
            f"{of['measured_bytes'] / 2**20:,.0f}",
            f"{of['said_bytes'] / of['measured_bytes'] - 1:+.0%}",
        ]
        for path, stages in results.items()
        for stage, of in stages.items()
    ]
    return markdown_table(("", "said, MiB", "measured, MiB", "difference"), rows)


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="needs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", type=Path, nargs="+", help="YAML files of light runs")
    parser.add_argument("--steps", type=int, default=6, help="batches that stages train on")
    parser.add_argument("--dense", action="store_true", help="stages of the whole model alone; nothing is cut")
    parser.add_argument("--out", type=Path, help="JSON file for every number")
    options = parser.parse_args(arguments)
    quiet()
    found = {"steps": options.steps}

    def found_all() -> dict[str, Any]:
        check_counts(options, "steps")
        return {**found, "results": measure(options.configs, options.steps, options.dense)}

    return report("needs", arguments, options.out, found_all, markdown)


if __name__ == "__main__":
    sys.exit(main())
