"""What masks and importances cost: the estimation stage beside PEFT on the same sites, in alternation.

    python benchmarks/estimation_cost.py configs/movie_reviews/minilm_default.yaml

Modules sit in every block, so that PEFT alone runs backwards through all of them too; a third subject is estimation as
the config has it. Prints and writes training speed and peak memory. Paths inside the config are relative to the current
folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from readme_tables import fill, markdown_table
from rich.console import Console
from torch import nn

from lightpeft import pipeline
from lightpeft.bench import Subject, Worker, adamw
from lightpeft.cli import quiet
from lightpeft.config import load_config
from lightpeft.errors import LightPeftError
from lightpeft.loading import add_peft
from lightpeft.pipeline import Workspace
from lightpeft.profiling import alternate, hardware, ratio, summarize
from lightpeft.records import write_json

PLAIN, MASKED, AS_IT_IS = "PEFT in every block", "with masks and importances", "estimation as the config has it"


def same_sites(work: Workspace) -> tuple[nn.Module, Callable[..., torch.optim.Optimizer]]:
    """The model that estimation starts with, without masks and observers."""
    return add_peft(pipeline.dense_model(work), work.config), adamw(work)


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file of a run")
    parser.add_argument("--rounds", type=int, default=9, help="alternations")
    parser.add_argument("--steps", type=int, default=12, help="batches a round")
    parser.add_argument("--out", type=Path, help="JSON file (default: runs/estimation_cost/<config's name>.json)")
    parser.add_argument("--write-readme", action="store_true", help="put the table into README.md")
    given = parser.parse_args(arguments)
    quiet()
    try:
        results = measure(given.config, given.rounds, given.steps)
        write_json(given.out or Path("runs") / "estimation_cost" / f"{given.config.stem}.json", results)
    except LightPeftError as error:
        Console(stderr=True, soft_wrap=True).print(f"estimation_cost: {error}", markup=False)
        return 2
    if given.write_readme:
        fill(f"estimation_cost {given.config.stem}", markdown(results))
    Console(width=120).print(markdown(results), markup=False)
    return 0


def measure(file: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Training samples/s by round, and peak memory, of all subjects."""
    config = load_config(file)
    everywhere = replace(config, light=replace(config.light, module_blocks=1.0))
    subjects = {
        PLAIN: (same_sites, everywhere),
        MASKED: ("estimation", everywhere),
        AS_IT_IS: ("estimation", config),
    }
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(Subject, *what, steps)) for name, what in subjects.items()}
        memory = {name: worker.measure("fixed")["peak_memory_bytes"] for name, worker in workers.items()}
        values = alternate({name: partial(worker.measure, "training") for name, worker in workers.items()}, rounds)
    return {
        "samples_per_second": {name: asdict(summarize(of)) for name, of in values.items()},
        "time_ratio": {name: asdict(ratio(values[PLAIN], of)) for name, of in values.items()},
        "memory_bytes": memory,
        "values": values,
        "hardware": hardware(),
        "config": asdict(config),
    }


def markdown(results: dict[str, Any]) -> str:
    """One row a subject, beside PEFT alone."""
    memory: dict[str, int] = results["memory_bytes"]
    rows = []
    for name, time in results["time_ratio"].items():
        rows.append(
            [
                name,
                f"{results['samples_per_second'][name]['median']:.0f}",
                f"{time['median'] - 1:+.1%} ({time['low'] - 1:+.1%} to {time['high'] - 1:+.1%})",
                f"{memory[name] / 2**20:.0f}",
                f"{memory[name] / memory[PLAIN] - 1:+.1%}",
            ]
        )
    return markdown_table(("", "training samples/s", "time a step", "peak memory, MiB", ""), rows)


if __name__ == "__main__":
    sys.exit(main())
