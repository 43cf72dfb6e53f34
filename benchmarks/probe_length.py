"""How long a probe of `light.blocks: auto` should be: what so many steps of training leave of what a cut costs.

    lightpeft estimate --config configs/movie_reviews/minilm_default.yaml
    python benchmarks/probe_length.py runs/movie_reviews/minilm_default --steps 0 10 20 40 80 --blocks 0.2 0.4 0.6 0.8

Copies of the model as estimation left it are cut to each budget and train for each number of steps, as probes do
(`lightpeft.prune.probing`); so does one that is not cut. Prints by how much the loss on the rows set aside is higher
than that of the latter, with its standard error, and writes it to --out.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from publishing import markdown_table, report
from transformers import set_seed

from lightpeft.cli.command import quiet
from lightpeft.errors import require
from lightpeft.plans.planning import make_plan
from lightpeft.plans.records import EstimationRecord
from lightpeft.recipe.probes import PART, make_probe
from lightpeft.runs import pipeline
from lightpeft.runs.stages import estimated_model
from lightpeft.runs.trainers import LightRun
from lightpeft.saved.run_folder import RunFolder

STEPS = (0, 10, 20, 40, 80)
BLOCKS = (0.2, 0.4, 0.6, 0.8)


def measure(folder: Path, steps: Sequence[int], budgets: Iterable[float]) -> dict[str, Any]:
    """Rises of the loss by steps and budget."""
    require(min(steps) >= 0, f"--steps has {min(steps)}; a probe takes 0 steps or more")
    run = RunFolder.at(folder)
    run.need("estimate", "probe_length")
    work = pipeline.prepare(run.config)
    record = EstimationRecord.load(run.estimation)
    set_seed(work.config.seed)
    model, light = estimated_model(work, record), work.config.light
    trainer = LightRun(work, model)
    seen = trainer.rows_of_steps(record.meta["steps"])
    as_if = round(max(steps) / PART)  # the run were so long that its probes are
    longest = make_probe(trainer, light, as_if, seen, work.config.training.fast_steps, length=max(steps))
    # as `light.blocks: auto` cuts: all ranks and modules stay
    plans = {part: make_plan(record, replace(light, ranks=0.0, modules=0.0, blocks=part)) for part in budgets}
    found = []
    for count in steps:
        probe = replace(longest, train=longest.train[: count * longest.accumulation])
        whole = probe.losses(model, None)
        for part, plan in plans.items():
            rises = probe.losses(model, plan) - whole
            error = float(rises.std()) / math.sqrt(len(rises))
            found.append({"steps": count, "blocks": part, "rise": float(rises.mean()), "standard_error": error})
    about = {"rows": len(longest.rows), "run_steps": work.steps, "estimation_steps": record.meta["steps"]}
    return {**about, "probes": found}


def markdown(results: dict[str, Any]) -> str:
    """One row a number of steps, one column a budget."""
    probes = results["probes"]
    budgets = list(dict.fromkeys(probe["blocks"] for probe in probes))
    rows: dict[int, list[str]] = {}
    for probe in probes:
        of_steps = rows.setdefault(probe["steps"], [str(probe["steps"])])
        of_steps.append(f"{probe['rise']:.3f} ± {probe['standard_error']:.3f}")
    return markdown_table(["steps", *(f"{part:.0%}" for part in budgets)], rows.values())


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="probe_length", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run whose estimation is over")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="optimizer steps of a probe")
    parser.add_argument("--blocks", type=float, nargs="+", default=BLOCKS, help="parts of the blocks that go")
    parser.add_argument("--out", type=Path, help="JSON file for every number")
    options = parser.parse_args(arguments)
    quiet()
    return report(
        "probe_length",
        arguments,
        options.out,
        lambda: {"results": measure(options.run, options.steps, options.blocks)},
        markdown,
    )


if __name__ == "__main__":
    sys.exit(main())
