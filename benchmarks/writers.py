"""Training a decoder small for its whole base: time and memory of a step by cut, beside plain LoRA, in alternation.

    python benchmarks/writers.py configs/socialiqa/smollm2_writer.yaml

The run is estimated and pruned first, with several cuts of one estimation. The time of a whole run is computed from the
medians: estimation, steps of the light model, and the last tenth of the steps at full width. Memory counts the weights.
Paths inside the config are relative to the current folder.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import subjects
from publishing import markdown_table, spread_text

from lightpeft.app.runs import pipeline
from lightpeft.app.runs.reuse import find_estimation, take_estimation
from lightpeft.app.runs.subject import Subject
from lightpeft.app.runs.workers import Worker
from lightpeft.config import RunConfig
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.structure import SLOTS
from lightpeft.profiling.comparing import alternate, ratio, summarize
from lightpeft.profiling.memory import weights_bytes
from lightpeft.profiling.surroundings import hardware

PLAIN, EVERYWHERE, ESTIMATION, WHOLE = "plain LoRA on q and v", "on all projections", "estimation", "no cut"
CUTS = (0.2, 0.4, 0.6, 0.75)
LAST = 0.1
"""Part of a light run's steps that trains at full width."""


class Weighed(Subject):
    """A subject that knows what its weights take."""

    def fixed(self) -> dict[str, Any]:
        """As a subject's, with `weights_bytes`, which the peak includes."""
        found, weights = super().fixed(), weights_bytes(self.model)
        outside = 0 if found["peak_memory_method"] == "cuda" else weights
        return {**found, "peak_memory_bytes": found["peak_memory_bytes"] + outside, "weights_bytes": weights}


def subjects_of(config: RunConfig) -> subjects.Subjects:
    """Plain LoRA in two places, estimation, and the model cut more and more."""
    folder = Path("runs") / "writers" / Path(config.output).name
    names = {f"{part:.0%} of the blocks cut": part for part in CUTS}
    first, *others = names
    scored = subjects.pruned(_cut(config, names[first]), folder / first)
    slots = replace(config, peft={**config.peft_settings, "slots": list(SLOTS)}, output=str(folder / EVERYWHERE))
    found: dict[str, tuple[Any, RunConfig]] = {
        PLAIN: ("plain", replace(config, output=str(folder / PLAIN))),
        EVERYWHERE: ("plain", slots),
        ESTIMATION: ("estimation", scored),
        WHOLE: ("light", subjects.pruned(_cut(config, 0.0), folder / WHOLE)),
        first: ("light", scored),
    }
    cut = {name: _pruned_by_the_same(_cut(config, names[name]), folder / name, scored) for name in others}
    return found | {name: ("light", settings) for name, settings in cut.items()}


def _cut(config: RunConfig, part: float) -> RunConfig:
    return replace(config, light=config.light.with_blocks(part))


def _pruned_by_the_same(config: RunConfig, folder: Path, donor: RunConfig) -> RunConfig:
    """Another cut, by the scores of a run that is there."""
    config = replace(config, method="light", output=str(folder))
    take_estimation(pipeline.prepare(config).run, find_estimation(config, Path(donor.output)))
    return subjects.pruned(config, folder)


def measure(found: subjects.Subjects, rounds: int, steps: int) -> dict[str, Any]:
    """Training samples/s by round, and what training takes in memory, of all subjects."""
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(Weighed, *what, steps)) for name, what in found.items()}
        fixed = {name: worker.measure("fixed") for name, worker in workers.items()}
        values = alternate({name: partial(worker.measure, "training") for name, worker in workers.items()}, rounds)
    scored = found[ESTIMATION][1]
    work = pipeline.prepare(scored)
    estimation = EstimationRecord.load(work.run.estimation).meta["steps"]
    shares = _shares(list(found), estimation / work.steps)
    runs = {name: _seconds(values, share) for name, share in shares.items()}
    return {
        "samples_per_second": {name: asdict(summarize(of)) for name, of in values.items()},
        "memory_bytes": {name: each["peak_memory_bytes"] for name, each in fixed.items()},
        "weights_bytes": {name: each["weights_bytes"] for name, each in fixed.items()},
        "training_flops": {name: each["flops"]["training"] for name, each in fixed.items()},
        "run_time_ratio": {
            name: [asdict(ratio(of, runs[other])) for other in (PLAIN, EVERYWHERE)] for name, of in runs.items()
        },
        "shares": shares,
        "values": values,
        "hardware": hardware(),
        "config": asdict(scored),
    }


def _shares(names: list[str], estimation: float) -> dict[str, dict[str, float]]:
    """Run -> which parts of its steps are steps of which subject."""
    shares = {name: {name: 1.0} for name in (PLAIN, EVERYWHERE, WHOLE)}  # where nothing is cut, nothing is estimated
    for name in names[names.index(WHOLE) + 1 :]:
        shares[name] = {ESTIMATION: estimation, name: 1 - estimation - LAST, WHOLE: LAST}
    return shares


def _seconds(values: dict[str, list[float]], shares: dict[str, float]) -> list[float]:
    """A row of a run, round by round."""
    parts = [[part / speed for speed in values[of]] for of, part in shares.items()]
    return [sum(each) for each in zip(*parts, strict=True)]


def markdown(results: dict[str, Any]) -> str:
    """One row a subject."""
    first = results["memory_bytes"][PLAIN]
    rows = []
    for name, speed in results["samples_per_second"].items():
        ratios = results["run_time_ratio"].get(name)
        rows.append(
            [
                name,
                f"{speed['median']:.1f}",
                *(["-", "-"] if ratios is None else [spread_text(each) for each in ratios]),
                f"{results['memory_bytes'][name] / 2**20:,.0f}",
                f"{results['memory_bytes'][name] / first:.2f}",
                f"{results['training_flops'][name] / results['training_flops'][PLAIN]:.2f}",
            ]
        )
    header = (
        "",
        "training samples/s",
        "whole run, of plain",
        "of plain everywhere",
        "memory, MiB",
        "of plain",
        "FLOPs",
    )
    return markdown_table(header, rows)


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    return subjects.main("writers", __doc__ or "", subjects_of, arguments, measure, markdown)


if __name__ == "__main__":
    sys.exit(main())
