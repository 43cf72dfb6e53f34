"""What might help a model to recover from the cut, or to be cut better: variants of one light run, over seeds.

    python benchmarks/recovery.py configs/movie_reviews/minilm_short.yaml --seeds 0 1 2
    python benchmarks/recovery.py configs/socialiqa/smollm2_small.yaml --seeds 0 --blocks 0.1 0.2

A decoder that writes (causal-lm) has variants of its own. `--blocks` compares them at other budgets than the config's.

A grid (docs/reproduce.md) whose cells are (variant, seed): finished ones are not repeated. Prints and writes its table
of differences to the run as it is, paired by seed. Paths inside the config are relative to the current folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import publishing
import recovery_arms
import recovery_writers
from recovery_arms import AS_IT_IS
from rich.console import Console

from lightpeft.cli.command import quiet
from lightpeft.config import load_config
from lightpeft.config.validation import load_yaml
from lightpeft.errors import LightPeftError
from lightpeft.files import read_json
from lightpeft.runs.reproduce import Grid, Results, markdown_table, reproduce
from lightpeft.runs.reproduce.running import Launch


def main(arguments: list[str] | None = None, launch: Launch | None = None) -> int:
    """Run what is not done, and write; 0 if all went well, 1 if a cell failed, 2 on bad input.

    Args:
        launch: how a cell is run, as for `reproduce`.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--blocks", type=float, nargs="+", default=[], help="budgets (default: the config's)")
    parser.add_argument("--only", nargs="+", default=[], metavar="AXIS=NAME", help="a part, as in seed=0")
    parser.add_argument("--out", type=Path, help="folder of runs (default: runs/recovery/<config's name>)")
    publishing.add_option(parser)
    given = parser.parse_args(arguments)
    out = given.out or Path("runs") / "recovery" / given.config.stem
    quiet()
    try:
        grid = grid_of(given.config, given.seeds, given.blocks, publishing.command("recovery", arguments))
        results = reproduce(grid, out, given.only, devices=1, launch=launch)
        if given.write_readme:
            publish(results, given.config.stem, out)
    except LightPeftError as error:
        publishing.say(f"recovery: {error}")
        return 2
    Console(width=160).print(markdown_table(results), markup=False)
    return 1 if results.failures else 0


def grid_of(file: Path, seeds: Sequence[int], blocks: Sequence[float], command: str) -> Grid:
    """All variants of the light run of a config, at its budget or at others."""
    task = load_config(file).data.task
    settings = {name: value for name, value in load_yaml(file).items() if name not in ("output", "seed")}
    return Grid(
        name=str(file),
        models={f"{file.stem} {100 * budget:g}%": {"light": {"blocks": budget}} for budget in blocks}
        or {file.stem: {}},
        tasks={task: {}},
        arms=recovery_writers.ARMS if task == "causal-lm" else recovery_arms.ARMS,
        seeds=seeds,
        baseline=AS_IT_IS,
        command=command,
        run={**settings, "method": "light"},
    )


def publish(results: Results, config: str, out: Path) -> None:
    """Numbers beside README.md, and the table in it."""
    numbers = f"{config}.recovery.json"
    text = f"{markdown_table(results)}\nEvery number: [{numbers}]({numbers})."
    publishing.publish(f"recovery {config}", text, numbers, read_json(out / "results.json"))


if __name__ == "__main__":
    sys.exit(main())
