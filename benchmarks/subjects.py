"""Several subjects of one run, measured in alternation: by default training speed and memory, and their table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from publishing import add_option, check_counts, command, markdown_table, publish, say
from rich.console import Console

from lightpeft.app.cli.command import quiet
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.reproduce.saving import factored
from lightpeft.app.runs.subject import Build, Subject
from lightpeft.app.runs.workers import Worker
from lightpeft.config import RunConfig, load_config
from lightpeft.errors import LightPeftError
from lightpeft.files import write_json
from lightpeft.profiling.comparing import alternate, ratio, summarize
from lightpeft.profiling.surroundings import hardware

Subjects = Mapping[str, tuple[str | Build, RunConfig]]
"""By name: what to measure, as `lightpeft.app.runs.subject.Subject` takes it, and its run."""


def pruned(config: RunConfig, folder: Path) -> RunConfig:
    """The light run of a config in a folder of its own, estimated and pruned."""
    config = replace(config, method="light", output=str(folder))
    work = pipeline.prepare(config)
    pipeline.estimate(work)
    pipeline.plan(work)
    pipeline.prune(work)
    return config


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The config with some settings, by dotted name, replaced."""
    for path, value in settings.items():
        config = _with(config, path.split("."), value)
    return config


def _with(section: Any, path: Sequence[str], value: Any) -> Any:
    """A section of settings with one of them replaced, which may lie in a section of its own."""
    name, *inner = path
    return replace(section, **{name: _with(getattr(section, name), inner, value) if inner else value})


def measure(subjects: Subjects, rounds: int, steps: int) -> dict[str, Any]:
    """Training samples/s by round, and peak memory, of all subjects."""
    first = next(iter(subjects))
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(Subject, *what, steps)) for name, what in subjects.items()}
        memory = {name: worker.measure("fixed")["peak_memory_bytes"] for name, worker in workers.items()}
        values = alternate({name: partial(worker.measure, "training") for name, worker in workers.items()}, rounds)
    settings, own = factored({name: asdict(config) for name, (_, config) in subjects.items()})
    return {
        "samples_per_second": {name: asdict(summarize(of)) for name, of in values.items()},
        "time_ratio": {name: asdict(ratio(values[first], of)) for name, of in values.items()},
        "memory_bytes": memory,
        "values": values,
        "hardware": hardware(),
        "settings": settings,
        "configs": own,
    }


def markdown(results: dict[str, Any]) -> str:
    """One row a subject, beside the first."""
    memory: dict[str, int] = results["memory_bytes"]
    first = next(iter(memory))
    rows = []
    for name, time in results["time_ratio"].items():
        rows.append(
            [
                name,
                _speed(results["samples_per_second"][name]["median"]),
                f"{time['median'] - 1:+.1%} ({time['low'] - 1:+.1%} to {time['high'] - 1:+.1%})",
                f"{memory[name] / 2**20:.0f}",
                f"{memory[name] / memory[first] - 1:+.1%}",
            ]
        )
    return markdown_table(("", "training samples/s", "time a step", "peak memory, MiB", ""), rows)


def _speed(samples: float) -> str:
    return f"{samples:.0f}" if samples >= 10 else f"{samples:.2f}"


def main(
    script: str,
    about: str,
    subjects_of: Callable[[RunConfig], Subjects],
    arguments: list[str] | None = None,
    measure: Callable[[Subjects, int, int], dict[str, Any]] = measure,
    markdown: Callable[[dict[str, Any]], str] = markdown,
) -> int:
    """Measure the subjects of the config on the command line, and write; 0 if all went well, 2 on bad input.

    Args:
        script: name of the program, of its folder of results, and of its table in README.md.
        subjects_of: makes the subjects of a config; the first is what the others are compared with.
        measure: takes subjects, rounds and batches a round; gives the results.
        markdown: the results as a table.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file of a run")
    parser.add_argument("--rounds", type=int, default=9, help="alternations")
    parser.add_argument("--steps", type=int, default=12, help="batches a round")
    parser.add_argument("--out", type=Path, help=f"JSON file (default: runs/{script}/<config's name>.json)")
    add_option(parser)
    given = parser.parse_args(arguments)
    name = given.config.stem
    quiet()
    try:
        check_counts(given, "rounds", "steps")
        measured = measure(subjects_of(load_config(given.config)), given.rounds, given.steps)
        results = {**measured, "command": command(script, arguments)}
        write_json(given.out or Path("runs") / script / f"{name}.json", results)
        if given.write_readme:
            publish(f"{script} {name}", markdown(results), f"{name}.{script}.json", results)
    except LightPeftError as error:
        say(f"{script}: {error}")
        return 2
    Console(width=120).print(markdown(results), markup=False)
    return 0
