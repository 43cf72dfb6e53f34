"""How deep a task has to be read: what a linear classifier makes of each block's output, before anything is trained.

    python benchmarks/depth_probe.py configs/movie_reviews/smollm2_depth.yaml

What `light.depth: auto` goes by (`lightpeft.find_depth`): blocks above the one from which on a classifier gains nothing
may do nothing for the task. Prints and writes accuracy and squared error by block, of encoders as well. Paths inside
the config are relative to the current folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import publishing
from rich.console import Console
from transformers import set_seed

from lightpeft.cli.command import quiet
from lightpeft.config import load_config
from lightpeft.errors import LightPeftError, require
from lightpeft.files import write_json
from lightpeft.machine import autocast_dtype
from lightpeft.models.task_heads import CLASSIFICATION
from lightpeft.profiling import hardware
from lightpeft.prune.reading import ROWS, find_depth
from lightpeft.runs import pipeline


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file of a run that classifies")
    parser.add_argument("--rows", type=int, default=ROWS, help="training rows that are looked at")
    publishing.add_option(parser)
    given = parser.parse_args(arguments)
    quiet()
    try:
        results = {**measure(given.config, given.rows), "command": publishing.command("depth_probe", arguments)}
        numbers = f"{given.config.stem}.depth_probe.json"
        write_json(Path("runs") / "depth_probe" / numbers, results)
        if given.write_readme:
            publishing.publish(f"depth_probe {given.config.stem}", markdown(results), numbers, results)
    except LightPeftError as error:
        publishing.say(f"depth_probe: {error}")
        return 2
    Console(width=200).print(markdown(results), markup=False)
    return 0


def measure(path: Path, count: int) -> dict[str, Any]:
    """What every block's output says about the labels of so many training rows."""
    config = load_config(path)
    set_seed(config.seed)
    work = pipeline.prepare(config)
    require(
        work.task.head == CLASSIFICATION,
        f"{path} does not classify; a linear classifier cannot say how deep it reads",
    )
    require(2 <= count <= len(work.train_rows), f"--rows is {count}; there are {len(work.train_rows)} training rows")
    found = find_depth(work.dense_model().model, work.drawn_batches(count), autocast_dtype(config.training))
    return {
        "config": str(path),
        "rows": count,
        "blocks": [{"accuracy": a, "error": e} for a, e in zip(found.accuracy, found.error, strict=True)],
        "enough": found.enough,
        "hardware": hardware(),
        "settings": asdict(config),
    }


def markdown(results: Mapping[str, Any]) -> str:
    """One row a depth."""
    rows = [
        [str(number), f"{100 * block['accuracy']:.1f}", f"{block['error']:.3f}"]
        for number, block in enumerate(results["blocks"], 1)
    ]
    table = publishing.markdown_table(("blocks", "accuracy, %", "squared error"), rows)
    note = f"{results['rows']} training rows; within a standard error of the best from {results['enough']} blocks on."
    return f"{table}\n\n{note}"


if __name__ == "__main__":
    sys.exit(main())
