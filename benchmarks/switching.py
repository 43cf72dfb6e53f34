"""Many tasks over one base in one process: memory by the number of tasks, and how long a switch takes.

    python benchmarks/switching.py demo/cache/smollm2 --tasks 16

Light adapters with plans by chance, which takes no training: LoRA on q and v, a part of the heads and neurons gone,
other ones in each task. Beside `LightSwitch`: a model by `load_light` for each task, and PEFT's own way, all adapters
(LoRA on q and v of the whole model) on one dense base. Each way has a process of its own over files that no other
process maps, and every model answers once, so that what is mapped is there. What imports take is left out. Times are of
the process's one thread, so that they do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
from low_memory import budget
from peft import PeftModel
from publishing import markdown_table, report
from synthetic import with_lora
from transformers import AutoModelForCausalLM, set_seed

from lightpeft import LightSwitch, load_light
from lightpeft.app.cli.command import quiet
from lightpeft.app.runs.workers import Worker
from lightpeft.errors import require
from lightpeft.recipe.pruner import EarlyPruner

TOKENS = 32
DTYPES = ("float32", "bfloat16")


class Preparing:
    """Writes the adapters, in a process whose memory is gone before anything is measured."""

    def __init__(self, base: str, folder: Path) -> None:
        self.base, self.folder = base, folder

    def write(self, number: int, part: float) -> None:
        """A light adapter and a plain one for a task."""
        set_seed(number)
        model = with_lora(AutoModelForCausalLM.from_pretrained(self.base, dtype="float32"), ("q", "v"))
        model.save_pretrained(self.folder / f"plain/{number}")
        pruner = EarlyPruner(model, replace(budget(part), seed=number))
        pruner.start(100)
        ids = torch.arange(1, 9).unsqueeze(0)
        while not pruner.finished:
            model(input_ids=ids, labels=ids).loss.backward()
            pruner.step()
            model.zero_grad()
        pruner.prune().save_pretrained(self.folder / f"light/{number}")


class Serving(ABC):
    """A way to have many tasks, in a process that has imported everything and loaded nothing."""

    label: ClassVar[str]
    kind: ClassVar[str] = "light"
    """Of the adapters."""

    def __init__(self, base: str, folder: Path, tasks: int, dtype: str) -> None:
        self.base, self.dtype = base, dtype
        self.places = {str(number): folder / self.kind / str(number) for number in range(tasks)}
        self.names = list(self.places)

    @abstractmethod
    def begin(self, most: int) -> None:
        """Get ready to keep so many tasks."""

    @abstractmethod
    def give(self, name: str) -> Any:
        """The model of a task, as it is when it is asked for."""

    def memory(self, counts: Sequence[int]) -> dict[str, dict[str, int]]:
        """Bytes that so many tasks take, by PSS and USS, after each has answered once."""
        before = psutil.Process().memory_full_info()
        self.begin(len(self.names))
        found = {}
        for count in counts:
            for name in self.names[:count]:
                self.answer(self.give(name))
            now = psutil.Process().memory_full_info()
            found[str(count)] = {kind: getattr(now, kind) - getattr(before, kind) for kind in ("pss", "uss")}
        return found

    def times(self, rounds: int) -> dict[str, list[float]]:
        """Seconds of computing until a task's model is there: at first, after it had to go, and while it is kept."""
        self.begin(1)
        first, second = self.names[:2]
        self.give(first)  # what is imported only then
        fresh = [self.seconds(name) for name in self.names[1:rounds]]
        again = [self.seconds((first, second)[turn % 2]) for turn in range(rounds)]
        here = (first, second)[(rounds - 1) % 2]
        return {"first": fresh, "again": again, "kept": [self.seconds(here) for _ in range(rounds)]}

    def seconds(self, name: str) -> float:
        """Seconds of computing until the model of a task is there."""
        started = time.process_time()
        self.give(name)
        return time.process_time() - started

    @staticmethod
    @torch.inference_mode()
    def answer(model: Any) -> None:
        """One forward pass, which reads every weight."""
        model(input_ids=torch.arange(1, TOKENS + 1).unsqueeze(0))


class Switch(Serving):
    """`LightSwitch`."""

    label = "LightSwitch"

    def begin(self, most: int) -> None:
        self.switch = LightSwitch(self.places, self.base, most=most, dtype=self.dtype)

    def give(self, name: str) -> Any:
        return self.switch[name]


class Alone(Serving):
    """A model by `load_light` for each task."""

    label = "load_light, a model each"

    def begin(self, most: int) -> None:
        self.most = most
        self.models: dict[str, Any] = {}

    def give(self, name: str) -> Any:
        if name not in self.models:
            if len(self.models) == self.most:
                self.models.pop(next(iter(self.models)))
            self.models[name] = load_light(self.places[name], self.base, dtype=self.dtype)
        return self.models[name]


class Plain(Serving):
    """PEFT's own: all adapters on one dense base."""

    label = "PEFT, all adapters on one dense base"
    kind = "plain"

    def begin(self, most: int) -> None:
        self.model: Any = None

    def give(self, name: str) -> Any:
        if self.model is None:
            dense = AutoModelForCausalLM.from_pretrained(self.base, dtype=self.dtype)
            self.model = PeftModel.from_pretrained(dense, str(self.places[name]), adapter_name=name)
        if name not in self.model.peft_config:
            self.model.load_adapter(str(self.places[name]), name)
        self.model.set_adapter(name, inference_mode=True)
        return self.model


class Dense(Serving):
    """The base alone."""

    label = "the dense base alone"

    def begin(self, most: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(self.base, dtype=self.dtype)

    def give(self, name: str) -> Any:
        return self.model


WAYS: dict[str, type[Serving]] = {"dense": Dense, "switch": Switch, "alone": Alone, "plain": Plain}


def measure(base: str, tasks: int, part: float, rounds: int, dtypes: Sequence[str]) -> dict[str, Any]:
    """All ways in all data types, one after another."""
    counts = sorted({1, min(4, tasks), tasks})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copied = str(shutil.copytree(base, folder / "base"))
        with Worker(Preparing, copied, folder) as worker:
            for number in range(tasks):
                worker.measure("write", number, part)
        return {
            dtype: {name: _measured(way, (copied, folder, tasks, dtype), counts, rounds) for name, way in WAYS.items()}
            for dtype in dtypes
        }


def _measured(way: type[Serving], arguments: tuple[Any, ...], counts: list[int], rounds: int) -> dict[str, Any]:
    with Worker(way, *arguments) as worker:
        memory = worker.measure("memory", counts[:1] if way is Dense else counts)
    if way is Dense:
        return {"memory": memory}
    with Worker(way, *arguments) as worker:
        times = worker.measure("times", rounds)
    return {"memory": memory, "seconds": times, "median_seconds": {k: statistics.median(v) for k, v in times.items()}}


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """One row a way and data type."""
    counts = list(next(iter(results.values()))["switch"]["memory"])
    moments: dict[str, Callable[[float], str]] = {
        "first": lambda s: f"{s:.2f} s",
        "again": lambda s: f"{s:.2f} s",
        "kept": lambda s: f"{1e3 * s:.2f} ms",
    }
    header = ("", *(f"{count} tasks, MiB" for count in counts), *moments)
    rows = []
    for dtype, ways in results.items():
        for name, found in ways.items():
            memory = [found["memory"].get(count) for count in counts]
            sizes = ["" if each is None else f"{each['pss'] / 2**20:,.0f}" for each in memory]
            medians = found.get("median_seconds")
            times = ["" if medians is None else text(medians[moment]) for moment, text in moments.items()]
            rows.append([f"{dtype}: {WAYS[name].label}", *sizes, *times])
    return markdown_table(header, rows)


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0 if all went well, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="switching", description=__doc__)
    parser.add_argument("base", help="folder of a causal language model in safetensors files")
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--part", type=float, default=0.4, help="of heads and neurons that is gone in each layer")
    parser.add_argument("--rounds", type=int, default=9, help="switches that are timed")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--out", type=Path, help="where all numbers go")
    options = parser.parse_args(arguments)
    quiet()

    def found() -> dict[str, Any]:
        require(options.tasks >= 2 and options.rounds >= 2, "--tasks and --rounds start at 2")
        results = measure(options.base, options.tasks, options.part, options.rounds, options.dtypes)
        plans = "by chance, without training"
        return {"base": options.base, "tasks": options.tasks, "part": options.part, "plans": plans, "results": results}

    return report("switching", arguments, options.out, found, markdown)


if __name__ == "__main__":
    sys.exit(main())
