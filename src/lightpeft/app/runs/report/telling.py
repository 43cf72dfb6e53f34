"""What the page says in words of a run, and of several beside one another."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightpeft.app.runs.report.facts import STAGES, RunFacts, number
from lightpeft.app.runs.report.words import count, duration, interval, metric_name, quality, share, size, times
from lightpeft.config import RunConfig

Form = Callable[[float], str]
"""How a number is said."""
COUNTS = ("examples", "tokens")
"""What stands among metrics and is none."""


# -- one run -------------------------------------------------------------------------------------------------------


def outcome(run: RunFacts) -> str:
    """One sentence: what is gone or trained, how good it is, how long it took; or what is still to come."""
    if run.missing:
        return f"Not finished: {_listed([stage.title.lower() for stage in run.missing])} still to come."
    parts = [*_gone(run), *_worth(run)]
    seconds = run.training_seconds
    parts += [] if seconds is None else [f"trained in {duration(seconds)}"]
    return f"{', '.join(parts)}."


def _gone(run: RunFacts) -> Iterator[str]:
    if run.plan is not None and run.plan.cuts_blocks:
        yield f"{share(run.plan.removed_of_blocks)} of the blocks\u2019 parameters gone"
    elif run.plan is not None and run.plan.cuts_modules:
        yield f"Nothing of the blocks gone, {len(run.plan.sites)} of {len(run.plan.dense_sites)} PEFT modules left"
    elif run.plan is not None:
        yield "Nothing cut"
    elif run.report is not None and "trained" in run.report.parameters:
        trained, base = run.report.parameters["trained"], run.report.parameters.get("base_dense")
        yield f"{count(trained)} parameters trained" + (f" ({trained / base:.2%} of the base)" if base else "")


def mark(run: RunFacts) -> str:
    """What was done where estimation ended."""
    if run.plan is not None and run.plan.cuts_blocks:
        return "the cut"
    return "modules cut" if run.plan is not None and run.plan.cuts_modules else "end of estimation"


def _worth(run: RunFacts) -> Iterator[str]:
    name = run.main_metric
    if run.report is None or name is None or name not in run.report.metrics:
        return
    ends = run.report.intervals.get(name)
    value = quality(name, run.report.metrics[name])
    yield f"{value} {metric_name(name)}" + (f" ({interval(name, ends)})" if ends else "")


def _listed(words: Sequence[str]) -> str:
    """a, b and c are."""
    joined = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return f"{joined} {'are' if len(words) > 1 else 'is'}"


def model_name(config: RunConfig) -> str:
    """The base, as short as it is still told by."""
    return config.model.name.rstrip("/").rpartition("/")[2] or config.model.name


def task_name(config: RunConfig) -> str:
    """The task, with its rows where it is a kind."""
    rows = "/".join((config.data.path or config.data.train).rstrip("/").split("/")[-2:])
    return f"{config.data.task} ({rows})" if rows else config.data.task


def method_name(config: RunConfig) -> str:
    """The method, with its PEFT kind."""
    names = {"light": "Light-PEFT", "plain": "plain PEFT", "full": "full fine-tuning"}
    return f"{names[config.method]} ({config.peft_type})" if config.way.has_peft else names[config.method]


def command(run: RunFacts) -> str:
    """What repeats the run, from where it was started."""
    again = f"{run.name}_again"
    return shlex.join(["lightpeft", "run", "--config", str(run.folder / "config.yaml"), "--output", again])


def going_on(run: RunFacts) -> str:
    """What does the rest of a run."""
    return shlex.join(["lightpeft", "run", "--run", str(run.folder)])


def metrics(run: RunFacts) -> list[tuple[str, float, tuple[float, float] | None]]:
    """Metric by metric: its name, value and interval; counts are none."""
    found = run.report
    named = found.metrics.items() if found is not None else ()
    return [(name, value, found.intervals.get(name)) for name, value in named if name not in COUNTS] if found else []


def milestones(run: RunFacts) -> list[str]:
    """Metrics that the moments on the run's way are told by."""
    moments = [] if run.report is None else [*run.report.milestones.metrics.values()]
    return list(dict.fromkeys(name for values in moments for name in values))


def measured_rise(run: RunFacts, runs: Sequence[RunFacts]) -> tuple[float, str] | None:
    """By how much the loss on the test rows is higher than that of a run which cut nothing, and which one that is."""
    others = (each for each in runs if each is not run and each.plan is not None)
    whole = next((each for each in others if each.plan and not each.plan.cuts_blocks), None)
    if whole is None or whole.report is None or run.report is None or whole.config.data != run.config.data:
        return None
    loss, of_whole = run.report.metrics.get("loss"), whole.report.metrics.get("loss")
    if loss is None or of_whole is None:
        return None
    return loss - of_whole, f"loss on the test rows against that of {whole.folder}, which cut nothing of the blocks"


# -- several -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BesideRow:
    """One measure of several runs."""

    name: str
    cells: list[tuple[str, str]]
    """(value, its ratio to the reference or its interval; both may be empty)."""


def reference_of(runs: Sequence[RunFacts]) -> int:
    """Which run the others are held against: the first one of plain PEFT, or else the first."""
    return next((index for index, run in enumerate(runs) if run.config.method == "plain"), 0)


def beside(runs: Sequence[RunFacts], reference: int) -> list[BesideRow]:
    """All that can be held side by side."""
    names = dict.fromkeys(name for run in runs for name, _, _ in metrics(run))
    rows = [BesideRow(metric_name(name), [_quality_cell(run, name) for run in runs]) for name in names]
    for what, key in (("base parameters", "base"), ("trained parameters", "trained")):
        values = [run.report.parameters.get(key) if run.report else None for run in runs]
        rows.append(BesideRow(what, _cells(values, reference, count)))
    rows.append(BesideRow("saved result", _cells([_bytes(run) for run in runs], reference, size)))
    seconds = [{stage.name: stage.seconds for stage in run.stages} for run in runs]
    timed = {title: [of.get(name) for of in seconds] for name, title in STAGES.items()}
    evaluation = timed.pop(STAGES["evaluate"])
    timed |= {"all of these": [run.training_seconds for run in runs], STAGES["evaluate"]: evaluation}
    rows += [BesideRow(f"time: {title.lower()}", _cells(of, reference, duration)) for title, of in timed.items()]
    rows.append(BesideRow("peak memory of training", _cells([r.peak_memory_bytes for r in runs], reference, size)))
    return [row for row in rows if any(value for value, _ in row.cells)]


def _bytes(run: RunFacts) -> int | None:
    return None if run.report is None else run.report.adapter_bytes


def _quality_cell(run: RunFacts, name: str) -> tuple[str, str]:
    if run.report is None or name not in run.report.metrics:
        return "", ""
    return quality(name, run.report.metrics[name]), interval(name, run.report.intervals.get(name))


def _cells(values: Sequence[float | None], reference: int, form: Form) -> list[tuple[str, str]]:
    of = values[reference]
    return [
        ("", "") if value is None else (form(value), "" if index == reference or not of else times(value / of))
        for index, value in enumerate(values)
    ]


def differing_settings(runs: Sequence[RunFacts]) -> list[tuple[str, list[str]]]:
    """Settings that differ among the runs whose method has a use for them, by dotted name."""
    flat = [_flat(run) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    rows = [(name, [settings.get(name, "") for settings in flat]) for name in names if name != "output"]
    return [(name, values) for name, values in rows if len({*values} - {""}) > 1]


def _flat(run: RunFacts) -> dict[str, str]:
    found: dict[str, str] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else str(key))
        elif not name.startswith(run.config.unused):
            found[name] = "unset" if value is None else str(value)

    walk(dataclasses.asdict(run.config), "")
    return found


def cautions(runs: Sequence[RunFacts]) -> Iterator[str]:
    """Why numbers of the runs may not be held side by side."""
    asked = {
        (
            c.data.task,
            c.data.path,
            c.data.test or c.data.train,
            c.data.limit_test,
            c.data.test_fraction,
        )
        for c in (run.config for run in runs)
    }
    if len(asked) > 1:
        yield "The runs were not all measured on the same test rows: their qualities cannot be compared."
    machines = {
        tuple(str(_machine(run).get(key)) for key in ("cpu", "gpu", "logical_cores", "torch_threads"))
        for run in runs
        if run.report
    }
    if len(machines) > 1:
        yield "The runs were made on different machines or with different numbers of threads: so are their times."
    if any(stage.resumed_at for run in runs for stage in run.stages):
        yield "A stage was resumed: its time is that of its last part alone."
    methods = {stage.peak_memory_method for run in runs for stage in run.stages if stage.peak_memory_method}
    if len(methods) > 1:
        yield "Peak memory was measured in different ways, and is not comparable."


def _machine(run: RunFacts) -> Mapping[str, Any]:
    return run.report.hardware if run.report is not None else {}


def hardware(run: RunFacts) -> list[tuple[str, str]]:
    """The machine and the versions, for people."""
    rows = []
    for name, value in _machine(run).items():
        memory = number(value) if name.endswith("_bytes") else None
        words = size(memory) if memory is not None else {None: "none", True: "yes", False: "no"}.get(value, str(value))
        rows.append((metric_name(name.removesuffix("_bytes")), words))
    return rows
