"""What a written graph is worth: its quality on the test rows of its run, and its speed beside the dense base."""

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

from lightpeft.app.evaluation.milestones import LOWER_IS_BETTER
from lightpeft.app.evaluation.scores import values_of
from lightpeft.app.exports.graphs import sessions
from lightpeft.app.exports.graphs.runtimes import Runtime
from lightpeft.app.exports.graphs.tracing import reads
from lightpeft.app.folders.forms import LightAdapter, Wanted
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.loading import load_task
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
"""What was measured, beside the graph."""
TIMED = 64
"""Rows at most that speed is measured on, drawn with a fixed seed."""
ROUNDS = 5
LOST = 0.01
"""Part of a metric that a graph may lose without a word: a point."""

Inputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of a graph."""

    runtime: str
    """What ran it, for people."""
    version: str
    """Of that."""
    dtype: str
    """Of its weights."""
    main_metric: str
    metrics: dict[str, float]
    """On the test rows of the run, one row at a time."""
    run: dict[str, float]
    """What the run itself measured on them; empty if it has not."""
    milliseconds: dict[str, Spread]
    """A row, one row at a time on one thread: of the `graph`, and of the `dense` base in PyTorch."""
    speedup: Spread
    """Dense over graph, round by round."""
    timed: int
    """Rows that this was measured on."""
    hardware: dict[str, Any]

    def lines(self) -> Iterator[str]:
        """The main metric and the speed, for people."""
        name = self.main_metric
        own = f"; the run itself: {self.run[name]:.4f}" if name in self.run else ""
        yield f"{self.dtype} in {self.runtime}: {name} {self.metrics[name]:.4f} on {self._examples} test rows{own}"
        graph, dense = (_in_words(self.milliseconds[each]) for each in ("graph", "dense"))
        beside = f"{graph} beside {dense} of the dense base in PyTorch in float32"
        yield f"one row at a time on one thread: {beside}, {self.speedup.median:.2f} times as fast"

    def doubts(self) -> Iterator[str]:
        """A line where the graph is worse than the run by more than a point; errors and losses have no points."""
        name = self.main_metric
        if name not in self.run or name in LOWER_IS_BETTER:
            return
        lost = self.run[name] - self.metrics[name]
        if lost > LOST:
            what = f"{self.dtype} loses {100 * lost:.1f} points of {name} on {self._examples} test rows"
            yield f"{what}; export with another --dtype, or in another --form"

    @property
    def _examples(self) -> str:
        return f"{self.metrics['examples']:,.0f}"


def measure_graph(adapter: LightAdapter, runtime: Runtime, folder: Path, dtype: str) -> Measured:
    """Ask a graph that was exported of a run, one test row at a time, and note what it is worth beside it (`MEASURED`).

    It runs on one thread as its runtime runs it unless told otherwise: OpenVINO computes in bfloat16 where the CPU can.

    Raises:
        LightPeftError: there is nothing to measure it by, such as the run's data, or it fails.
    """
    task = _task(adapter)
    tokenizer = adapter.tokenizer()
    rows, collator = task.encode_test(task.test, tokenizer), task.collator(tokenizer)
    run = dict(adapter.description.get("metrics", {}))
    counted = run.get("examples", len(rows))
    require(counted == len(rows), f"the run was measured on {counted:,.0f} test rows, and now there are {len(rows):,}")
    base = load_model(adapter.model, Wanted.of(task).head, task.labels, to_prune=False).model
    ensure_pad_token(tokenizer, base.config)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:TIMED].tolist()
    batches = [without_labels(collator(take_rows(rows, [row]))) for row in drawn]
    with parsing(f"{folder} does not run in {runtime.title}"), _one_thread():
        session = sessions.load(runtime.name, folder, exact=False)
        outcome = task.answer(_Asked(session, collator), rows)
        seconds = _timed({"graph": session.run, "dense": partial(_in_pytorch, base.cpu().float().eval())}, batches)
    measured = Measured(
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


def _task(adapter: LightAdapter) -> Task:
    """The task of the run with its test rows, if a graph of its model can be asked for all of an answer."""
    run = adapter.run
    require(run is not None, f"{adapter.name} is no folder of a run, which would say what its test rows are")
    assert run is not None
    task = load_task(run.data, adapter.config, run.tasks)
    writes = f"{run.data.task} is answered token by token, and not by one call of a graph"
    require(task.head != CAUSAL_LM, writes)
    require(not adapter.model.low_memory, "the dense base would have to be in memory, and model.low_memory is on")
    return replace(task, labels=adapter.class_names or task.labels)


@dataclass(frozen=True)
class _Asked:
    """A graph as a `Respondent` that answers by a head."""

    session: sessions.Session
    collator: Collator

    def outputs(self, encoded: Dataset, description: str) -> Iterator[tuple[Sequence[int], Inputs, Any]]:
        """One row at a time: activations in int8 have one scale a batch, so that what else is in it would count."""
        for row in bars.progress(range(len(encoded)), len(encoded), description):
            batch = self.collator(take_rows(encoded, [row]))
            yield [row], batch, SimpleNamespace(**self.session.run(without_labels(batch)))

    def next_logits(self, encoded: Dataset, description: str) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        raise NotImplementedError

    def texts(self, encoded: Dataset, max_new_tokens: int, *, one_line: bool = False) -> list[str]:
        raise NotImplementedError


@torch.inference_mode()
def _in_pytorch(model: PreTrainedModel, inputs: Inputs) -> Any:
    return model(**{name: value for name, value in inputs.items() if reads(model, name)})


def _timed(answers: Mapping[str, Callable[[Inputs], Any]], batches: Sequence[Inputs]) -> dict[str, list[float]]:
    """Milliseconds a row, round by round; a first round, in which each meets the lengths of the rows, is left out."""

    def once(answer: Callable[[Inputs], Any]) -> float:
        started = time.perf_counter()
        for inputs in batches:
            answer(inputs)
        return 1e3 * (time.perf_counter() - started) / len(batches)

    rounds = alternate({name: partial(once, answer) for name, answer in answers.items()}, 1 + ROUNDS)
    return {name: values[1:] for name, values in rounds.items()}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch compute on one thread inside the block, as the runtimes do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _in_words(spread: Spread) -> str:
    return f"{spread.median:.2f} ms ({spread.low:.2f} to {spread.high:.2f})"
