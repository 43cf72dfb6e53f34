"""Compare plain PEFT and the light model: speed, memory and FLOPs, each in a process of its own, in alternating rounds.

All get the same batches, padding, batch size and data type. Only one process computes at a time, so that a drift of a
noisy machine affects all subjects alike; ratios are computed within rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightpeft.app.runs import pipeline
from lightpeft.app.runs.subject import Subject
from lightpeft.app.runs.workers import Worker
from lightpeft.app.runs.workspace import Workspace, prepare
from lightpeft.config import RunConfig
from lightpeft.console.progress import StepProgress, duration, print_line
from lightpeft.errors import require
from lightpeft.files import check_no_folder, write_json
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.profiling.comparing import in_rounds, ratio, summarize
from lightpeft.profiling.surroundings import hardware

SUBJECTS = ("plain", "estimation", "light")
"""Plain PEFT on the dense model, the estimation stage (if the run has one), and the pruned model."""
_INFERRING = ("plain", "light")
"""Subjects whose inference is measured; estimation is a stage of training."""
_ONCE = {"fixed": "memory and FLOPs", "serving": "inference memory"}
"""Method of `Subject` that measures once -> its name in progress lines."""
ROUNDS, STEPS = 3, 10
"""Default number of rounds, and of batches per round."""
_LIMIT = 10_000
"""Upper limit of rounds, and of batches per round."""


def bench(
    config: RunConfig, rounds: int = ROUNDS, steps: int = STEPS, json: str | Path | None = None
) -> dict[str, Any]:
    """Measure the run of `config` against plain PEFT, and write the result to `json`, anew after each round.

    A run that has not been pruned yet is estimated, planned and pruned first.

    Args:
        rounds: alternations; medians and quartiles are over rounds.
        steps: batches per round.
        json: file for the result; None: bench.json in the run folder.

    Returns:
        By subject: samples/s in training and inference (merged weights where they can be merged), peak
        memory of both, FLOPs; ratios to plain PEFT; and the end-to-end time of a whole run computed from the medians,
        estimation included; `rounds` that are over, `of_rounds` that were asked for.

    Raises:
        LightPeftError: bad input, or a measurement failed.
        Stopped: by Ctrl-C; rounds that were over are kept.
    """
    for name, value in (("rounds", rounds), ("steps", steps)):
        require(value >= 1, f"--{name} is {value}; it must be at least 1")
    require(max(rounds, steps) <= _LIMIT, f"--rounds {rounds} and --steps {steps} must be at most {_LIMIT:,}")
    check_no_folder(json, "json")
    in_memory = "bench supports models in memory only; set model.low_memory to false"
    require(not config.model.low_memory, in_memory)
    config = replace(config, method="light")
    work = prepare(config)
    pipeline.estimate(work)
    pipeline.plan(work)
    pipeline.prune(work)
    place = Path(json or work.run.path / "bench.json")
    report: dict[str, Any] = {}
    try:
        for fixed, values in _measure_rounds(config, rounds, steps):
            report = _report(work, fixed, values) | {"of_rounds": rounds, "steps": steps}
            write_json(place, report)
    except KeyboardInterrupt as stop:
        done = f"{place} has {rounds_in_words(report['rounds'], rounds)}" if report else "no round was over"
        raise Stopped(f"stopped; {done}; the same command starts from the first round", report) from stop
    return report


class Stopped(KeyboardInterrupt):
    """Ctrl-C stopped a benchmark."""

    def __init__(self, line: str, report: dict[str, Any]) -> None:
        """
        Args:
            line: message for the user, with the number of finished rounds.
            report: the result of `bench` over the finished rounds; empty: none was finished.
        """
        super().__init__(line)
        self.report = report


def rounds_in_words(done: int, asked: int | None = None) -> str:
    """Return a number of rounds in words: "3 rounds", or "1 of 3 rounds" of a benchmark that was stopped."""
    of = f" of {asked}" if asked is not None and done < asked else ""
    return f"{done}{of} round{'s' * (done != 1 or bool(of))}"


def _report(work: Workspace, fixed: Mapping[str, dict[str, Any]], values: _Values) -> dict[str, Any]:
    """Make the result of `bench` from the rounds that are over."""
    training, inference = values["training"], values["inference"]
    return {
        "subjects": {
            name: {
                **fixed[name],
                "training_samples_per_second": asdict(summarize(training[name])),
                **({"inference_samples_per_second": asdict(summarize(inference[name]))} if name in inference else {}),
            }
            for name in fixed
        },
        "ratios": _ratios(training, inference, fixed),
        "end_to_end": _end_to_end(work, training, fixed["light"]["prefix_samples_per_second"]),
        "rounds": len(training["light"]),
        "values": values,
        "hardware": hardware(),
        "config": asdict(work.config),
    }


_Values = dict[str, dict[str, list[float]]]
"""training or inference -> subject -> samples a second, one a round."""


def _measure_rounds(config: RunConfig, rounds: int, steps: int) -> Iterator[tuple[dict[str, dict[str, Any]], _Values]]:
    """Yield, after each round, memory and FLOPs by subject, and the speeds of all rounds so far."""
    names = [name for name in SUBJECTS if name in _INFERRING or config.light.uses_scores]
    total = (1 + rounds) * (len(names) + len(_INFERRING))
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(Subject, name, config, steps)) for name in names}
        progress = StepProgress(total, 0, "measurements")

        def measuring(what: str, name: str) -> Callable[[], Any]:
            return partial(_measure_and_print, progress, workers[name], what, name)

        fixed = {name: measuring("fixed", name)() for name in names}
        for name in _INFERRING:
            fixed[name]["inference"] = measuring("serving", name)()
        seconds = rounds * sum(worker.measure("round_seconds") for worker in workers.values())
        of_batches = f"{rounds_in_words(rounds)} of {steps} batches take about {duration(seconds)}"
        print_line(f"{of_batches}; Ctrl-C stops and keeps the finished rounds")
        calls = {("training", name): measuring("training", name) for name in names}
        calls |= {("inference", name): measuring("inference", name) for name in _INFERRING}
        values: _Values = {"training": {}, "inference": {}}
        for found in in_rounds(calls, rounds):
            for what, name in calls:
                values[what].setdefault(name, []).append(found[what, name])
            yield fixed, values


def _measure_and_print(progress: StepProgress, worker: Worker, what: str, name: str) -> Any:
    """Measure a subject, and print the result as one step of the progress."""
    label = f"{name}, {_ONCE.get(what, what)}"
    progress.begin()
    value = worker.measure(what)
    told = f"{value['peak_memory_bytes'] / 2**20:,.0f} MiB" if what in _ONCE else f"{value:,.1f} samples/s"
    progress.end(label, told)
    return value


def _ratios(
    training: Mapping[str, list[float]], inference: Mapping[str, list[float]], fixed: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Compute the ratios of light, and of estimation if there is one, to plain PEFT; those of speeds within rounds."""
    speeds = {
        "training_throughput": ratio(training["light"], training["plain"]),
        "inference_throughput": ratio(inference["light"], inference["plain"]),
    }
    if "estimation" in training:
        speeds["estimation_throughput"] = ratio(training["estimation"], training["plain"])
    served = {name: fixed[name]["inference"] for name in _INFERRING}
    return {
        **{name: asdict(speed) for name, speed in speeds.items()},
        "peak_memory": fixed["light"]["peak_memory_bytes"] / max(fixed["plain"]["peak_memory_bytes"], 1),
        "inference_memory": served["light"]["peak_memory_bytes"] / served["plain"]["peak_memory_bytes"],
        "training_flops": fixed["light"]["flops"]["training"] / fixed["plain"]["flops"]["training"],
        "inference_flops": fixed["light"]["flops"]["forward"] / fixed["plain"]["flops"]["forward"],
    }


def _end_to_end(work: Workspace, training: Mapping[str, list[float]], prefix_speed: float | None) -> dict[str, float]:
    """Compute the seconds of whole runs of equal steps from medians; light includes estimation, cut and prefix cache.

    Args:
        prefix_speed: rows/s of computing the outputs of frozen blocks; None: they are not stored.
    """
    step_seconds = {
        name: work.config.training.batch_size * work.config.training.gradient_accumulation / summarize(values).median
        for name, values in training.items()
    }
    estimation_steps = EstimationRecord.load(work.run.estimation).meta["steps"]
    seconds = work.run.stage_seconds()
    # the searches of `auto` for depth and budget count as a part of it
    surgery = sum(seconds.get(stage, 0.0) for stage in ("depth", "budget", "prune"))
    estimation = estimation_steps * step_seconds.get("estimation", 0.0)
    caching = len(work.train_rows) / prefix_speed if prefix_speed else 0.0
    light = estimation + surgery + caching + (work.steps - estimation_steps) * step_seconds["light"]
    plain = work.steps * step_seconds["plain"]
    return {
        "steps": work.steps,
        "estimation_steps": estimation_steps,
        "plain_seconds": plain,
        "light_seconds": light,
        "light_estimation_seconds": estimation,
        "light_caching_seconds": caching,
        "light_over_plain": light / plain,
    }
