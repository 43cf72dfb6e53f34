"""How fast the peers train and infer: a few at a time, each in a process of its own, always beside plain LoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from peer_methods import BASELINE, PEERS
from peer_pruning import Goal
from publishing import say

from lightpeft.app.runs.subject import Subject
from lightpeft.app.runs.workers import Worker
from lightpeft.config import RunConfig
from lightpeft.files import read_json, write_json
from lightpeft.profiling.comparing import alternate, ratio, summarize

INFERENCE_BATCHES = (1, 32)
"""Rows a batch in the measurement of inference."""


@dataclass
class Speeds:
    """Measurements on disk, one file a peer."""

    folder: Path
    rounds: int
    """Alternations; 0: nothing is measured, and what is there is taken whatever its rounds."""
    steps: int
    """Batches a round."""
    together: int
    """Measuring processes at once, plain LoRA's included."""
    goal: Goal
    failures: dict[str, str] = field(default_factory=dict)
    """Measurement -> why it failed."""

    def measure(self, runs: Mapping[str, RunConfig]) -> None:
        """Measure what is not there yet.

        Args:
            runs: by peer, a finished run of it.
        """
        if not self.rounds or BASELINE not in runs:
            return
        todo = [name for name in runs if self.found(name) is None]
        others = [name for name in todo if name != BASELINE]
        size = self.together - 1
        for start in range(0, len(others) or len(todo), size):
            group = {name: runs[name] for name in (BASELINE, *others[start : start + size])}
            self._guard(f"speeds of {', '.join(group)}", partial(self._measure, group))

    def found(self, name: str) -> dict[str, Any] | None:
        """Samples/s as medians with quartiles, and ratios to plain LoRA within rounds; None if it was not measured."""
        path = self._path(name)
        speed = read_json(path) if path.is_file() else None
        if speed is None or (self.rounds and (speed["rounds"], speed["steps"]) != (self.rounds, self.steps)):
            return None
        ratios = {
            what: {
                "samples_per_second": asdict(summarize(values["own"])),
                "ratio": asdict(ratio(values["own"], values["baseline"])),
            }
            for what, values in speed["values"].items()
        }
        return {**ratios, **speed["fixed"], "values": speed["values"]}

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _measure(self, runs: Mapping[str, RunConfig]) -> None:
        say(f"measuring {', '.join(runs)}")
        with ExitStack() as stack:
            workers = {name: stack.enter_context(self._worker(name, config)) for name, config in runs.items()}
            fixed: dict[str, Any] = {}
            for name, worker in workers.items():
                self._guard(f"speed of {name}", lambda n=name, w=worker: fixed.update({n: w.measure("fixed")}))  # type: ignore[misc]
            alive = {name: worker for name, worker in workers.items() if name in fixed}
            if BASELINE in alive:
                self._write(fixed, self._alternated(alive))

    def _worker(self, name: str, config: RunConfig) -> Worker:
        return Worker(Subject, PEERS[name].subject(self.goal), config, self.steps)

    def _alternated(self, workers: Mapping[str, Worker]) -> dict[str, dict[str, list[float]]]:
        """Samples/s of all rounds, by what is measured and by peer."""
        asked: dict[str, Sequence[Any]] = {"training": ("training",)}
        asked |= {f"inference_{size}": ("inference", size) for size in INFERENCE_BATCHES}
        return {
            what: alternate({name: partial(w.measure, *arguments) for name, w in workers.items()}, self.rounds)
            for what, arguments in asked.items()
        }

    def _write(self, fixed: Mapping[str, Any], values: Mapping[str, Mapping[str, list[float]]]) -> None:
        for name in fixed:
            if name != BASELINE or self.found(name) is None:
                of_two = {what: {"own": of[name], "baseline": of[BASELINE]} for what, of in values.items()}
                counts = {"rounds": self.rounds, "steps": self.steps}
                write_json(self._path(name), {**counts, "fixed": fixed[name], "values": of_two})

    def _guard(self, what: str, act: Callable[[], None]) -> None:
        """Do something that belongs to one measurement; when it fails, report it and go on."""
        try:
            act()
        except Exception as error:  # noqa: BLE001 - whatever another library raises is that method's result
            self.failures[what] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            say(f"{what} failed: {self.failures[what]}")
