"""Measure a written graph: its quality on the run's test rows, and its speed against the dense base model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from lightpeft.app.evaluation.scores import LOWER_IS_BETTER, values_of
from lightpeft.app.exports.graphs import sessions
from lightpeft.app.exports.graphs.runtimes import Runtime
from lightpeft.app.exports.graphs.tracing import reads
from lightpeft.app.folders.forms import LightAdapter, Wanted
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.loading import load_task
from lightpeft.app.tasks.respondent import OutputsOnly
from lightpeft.app.tasks.tokens import Collator, take_rows
from lightpeft.console import bars
from lightpeft.errors import require
from lightpeft.files import write_json
from lightpeft.files.foreign import parsing
from lightpeft.models.batches import without_labels
from lightpeft.models.loading import load_model
from lightpeft.models.task_heads import CAUSAL_LM
from lightpeft.models.tokenizers import ensure_pad_token
from lightpeft.profiling.comparing import Spread, alternate, ratio, summarize
from lightpeft.profiling.surroundings import hardware, version_of

MEASURED = "measured.json"
"""File with the measurements, in the folder of the graph."""
TIMED_ROWS = 64
"""Most rows for timing, drawn with a fixed seed."""
ROUNDS = 5
TOLERATED_LOSS = 0.01
"""Loss of a metric up to which there is no warning: one point."""

Inputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class MeasuredGraph:
    """Measurements of a graph."""

    runtime: str
    """Title of the runtime."""
    version: str
    """Version of the runtime."""
    dtype: str
    """Data type of the weights."""
    main_metric: str
    metrics: dict[str, float]
    """Metrics of the graph on the run's test rows, one row at a time."""
    run: dict[str, float]
    """Metrics of the run on these rows; empty if it has none."""
    milliseconds: dict[str, Spread]
    """Milliseconds per row, one row at a time on one thread: `graph`, and `dense`, the base model in PyTorch."""
    speedup: Spread
    """Time of dense over time of graph, per round."""
    timed: int
    """Number of rows for timing."""
    hardware: dict[str, Any]

    def lines(self) -> Iterator[str]:
        """Yield the main metric and the speed as text for users."""
        name = self.main_metric
        own = f" (run: {self.run[name]:.4f})" if name in self.run else ""
        yield f"{self.dtype} in {self.runtime}: {name} {self.metrics[name]:.4f} on {self._examples} test rows{own}"
        graph, dense = (_format_spread(self.milliseconds[each]) for each in ("graph", "dense"))
        beside = f"{graph}, the dense base model in PyTorch float32 {dense}"
        yield f"time per row, one row at a time on one thread: {beside}, speedup {self.speedup.median:.2f}"

    def doubts(self) -> Iterator[str]:
        """Yield a warning if the graph is worse than the run by more than a point; not for losses and errors."""
        name = self.main_metric
        if name not in self.run or name in LOWER_IS_BETTER:
            return
        lost = self.run[name] - self.metrics[name]
        if lost > TOLERATED_LOSS:
            what = f"{self.dtype} loses {100 * lost:.1f} points of {name} on {self._examples} test rows"
            yield f"{what}; use another --dtype or --form"

    @property
    def _examples(self) -> str:
        return f"{self.metrics['examples']:,.0f}"


def measure_graph(adapter: LightAdapter, runtime: Runtime, folder: Path, dtype: str) -> MeasuredGraph:
    """Evaluate a graph that was exported from a run, one test row at a time, and write `MEASURED` beside it.

    It runs on one thread with the runtime's default precision: OpenVINO uses bfloat16 if the CPU supports it.

    Raises:
        LightPeftError: the run or its data are missing, or the graph does not run.
    """
    task = _load_task(adapter)
    tokenizer = adapter.tokenizer()
    rows, collator = task.encode_test(task.test, tokenizer), task.collator(tokenizer)
    run = dict(adapter.description.get("metrics", {}))
    counted = run.get("examples", len(rows))
    require(
        counted == len(rows),
        f"the run was measured on {counted:,.0f} test rows, but its data now have {len(rows):,}; restore the data",
    )
    base = load_model(adapter.model, Wanted.of(task).head, task.labels, to_prune=False).model
    ensure_pad_token(tokenizer, base.config)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:TIMED_ROWS].tolist()
    batches = [without_labels(collator(take_rows(rows, [row]))) for row in drawn]
    with parsing(f"{folder} does not run in {runtime.title}"), _one_thread():
        session = sessions.load(runtime.name, folder, exact=False)
        outcome = task.answer(_GraphRespondent(session, collator), rows)
        seconds = _time_rows({"graph": session.run, "dense": partial(_run_pytorch, base.cpu().float().eval())}, batches)
    measured = MeasuredGraph(
        runtime=runtime.title,
        version=version_of(runtime.tool),
        dtype=dtype,
        main_metric=task.main_metric,
        metrics=values_of(outcome, task),
        run=run,
        milliseconds={name: summarize(values) for name, values in seconds.items()},
        speedup=ratio(seconds["dense"], seconds["graph"]),
        timed=len(batches),
        hardware=hardware(),
    )
    write_json(folder / MEASURED, asdict(measured))
    return measured


def _load_task(adapter: LightAdapter) -> Task:
    """Return the task of the run with its test rows, if one call of the graph gives a whole answer."""
    run = adapter.run
    require(run is not None, f"{adapter.name} is not the folder of a run, so its test rows are unknown; give the run")
    assert run is not None
    task = load_task(run.data, adapter.config, run.tasks)
    writes = f"task {run.data.task} uses the language-modeling head; only graphs with a task's own head are measured"
    require(task.head != CAUSAL_LM, writes)
    require(
        not adapter.model.low_memory,
        "the dense base model must be in memory to be timed; set model.low_memory to false",
    )
    return replace(task, labels=adapter.class_names or task.labels)


@dataclass(frozen=True)
class _GraphRespondent(OutputsOnly):
    """A graph as a `Respondent`, for tasks with a head."""

    session: sessions.Session
    collator: Collator

    def outputs(self, encoded: Dataset, description: str) -> Iterator[tuple[Sequence[int], Inputs, Any]]:
        """Yield outputs of single rows: int8 activations share one scale per batch, so other rows would change them."""
        for row in bars.progress(range(len(encoded)), len(encoded), description):
            batch = self.collator(take_rows(encoded, [row]))
            yield [row], batch, SimpleNamespace(**self.session.run(without_labels(batch)))


@torch.inference_mode()
def _run_pytorch(model: PreTrainedModel, inputs: Inputs) -> Any:
    return model(**{name: value for name, value in inputs.items() if reads(model, name)})


def _time_rows(answers: Mapping[str, Callable[[Inputs], Any]], batches: Sequence[Inputs]) -> dict[str, list[float]]:
    """Return milliseconds per row of each round, without a warm-up round, which compiles for each row length."""

    def once(answer: Callable[[Inputs], Any]) -> float:
        started = time.perf_counter()
        for inputs in batches:
            answer(inputs)
        return 1e3 * (time.perf_counter() - started) / len(batches)

    rounds = alternate({name: partial(once, answer) for name, answer in answers.items()}, 1 + ROUNDS)
    return {name: values[1:] for name, values in rounds.items()}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit PyTorch to one thread inside the block, like the runtimes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _format_spread(spread: Spread) -> str:
    return f"{spread.median:.2f} ms ({spread.low:.2f} to {spread.high:.2f})"
