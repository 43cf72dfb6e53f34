"""Compare plain PEFT and the light model: speed, memory and FLOPs, each in a process of its own, in alternating rounds.

All get the same batches, padding, batch size and data type. Only one process computes at a time, so that a drift of a
noisy machine affects all subjects alike; ratios are computed within rounds.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from torch import nn
from transformers import set_seed

from lightpeft.app.folders.results import open_peft
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.workers import Worker
from lightpeft.app.runs.workspace import Workspace, prepare
from lightpeft.compat.transformers import LengthGroupedSampler
from lightpeft.config import RunConfig, override_light
from lightpeft.console.progress import StepProgress, duration, print_line
from lightpeft.errors import require
from lightpeft.files import write_json
from lightpeft.machine import autocast_dtype
from lightpeft.peft_kinds.kinds import kind_named
from lightpeft.peft_kinds.placing import add_peft
from lightpeft.peft_kinds.sites.inference import fused_inference
from lightpeft.plans.records import EstimationRecord
from lightpeft.profiling.comparing import in_rounds, ratio, summarize
from lightpeft.profiling.flops import count_flops, kv_cache_bytes
from lightpeft.profiling.memory import PeakMemory, weights_bytes
from lightpeft.profiling.speed import WARMUP, OptimizerFactory, measure_inference, measure_training
from lightpeft.profiling.surroundings import hardware
from lightpeft.prune.estimation import Estimator
from lightpeft.training.acceleration import light_steps
from lightpeft.training.arguments import TRAINER_DEFAULTS
from lightpeft.training.prefix import CachedRows, FrozenPrefix, cache_prefix

Made = tuple[nn.Module, Callable[..., torch.optim.Optimizer]]
"""A model, and the factory of its optimizer."""
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
_MEASURED_STEPS = 3
"""Training steps of the memory measurement: the second one allocates nothing new but the optimizer's state."""


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
    require(rounds >= 1 and steps >= 1, f"--rounds {rounds} and --steps {steps} must be at least 1")
    require(max(rounds, steps) <= _LIMIT, f"--rounds {rounds} and --steps {steps} must be at most {_LIMIT:,}")
    require(json is None or not Path(json).is_dir(), f"--json {json} is a folder; give a file")
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


def accelerating(work: Workspace, model: nn.Module) -> AbstractContextManager[None]:
    """Return the context in which training steps are those of a light run."""
    config = work.config
    return light_steps(model, config.light, fast=config.training.fast_steps, loss_only=True)


def by_habit(work: Workspace, model: nn.Module) -> AbstractContextManager[None]:
    """Return an empty context: training steps are those of PEFT, transformers and PyTorch."""
    return nullcontext()


@dataclass(frozen=True)
class Build:
    """How to make and train a subject; it is sent to another process, so all of it can be pickled."""

    make: Callable[[Workspace], Made]
    accelerating: Callable[[Workspace, nn.Module], AbstractContextManager[None]] = by_habit
    """Makes the context of a run and its model in which training is measured."""
    masked: bool = False
    """True: masks train in every block, so that no block is frozen."""
    autocast: torch.dtype | None = None
    """Half precision in place of the run's; None: the run's."""


class Subject:
    """The model of one subject, and the batches that all subjects share."""

    def __init__(self, build: str | Build, config: RunConfig, steps: int) -> None:
        """
        Args:
            build: how to make the model, or a name in `BUILDS`.
            steps: batches per measurement.
        """
        set_seed(config.seed)
        self.config = config
        self.work = prepare(config)
        self.batches = sample_batches(self.work, steps)
        self.build = BUILDS[build] if isinstance(build, str) else build
        self.autocast = self.build.autocast or autocast_dtype(config.training)
        self.model, self.optimizer = self.build.make(self.work)
        self._folder = tempfile.TemporaryDirectory()
        self._cached_rows: CachedRows | None = None
        self._prefix_speed: float | None = None
        self._round_seconds = 0.0

    def fixed(self) -> dict[str, Any]:
        """Measure once: peak memory of training, FLOPs of the largest batch, and KV cache bytes per token."""
        with self._training_as_a_run():
            with PeakMemory(self.model) as memory:
                seconds = self._train(self.batches[:_MEASURED_STEPS])
            self._add_seconds(self.batches[:_MEASURED_STEPS], seconds)
            flops = count_flops(self.model, max(self.batches, key=lambda batch: batch["input_ids"].numel()))
        return {
            "prefix_samples_per_second": self._prefix_speed,
            "peak_memory_bytes": memory.bytes,
            "peak_memory_method": memory.method,
            "flops": {"forward": flops.forward, "training": flops.training},
            "kv_cache_bytes_per_token": kv_cache_bytes(self.model, self.batches[0]),
        }

    def serving(self) -> dict[str, Any]:
        """Measure once: bytes of the weights with PEFT merged, and peak bytes of inference on the largest batch."""
        largest = max(self.batches, key=lambda batch: batch["input_ids"].numel())
        weights = weights_bytes(self._merged)
        with PeakMemory(self._merged) as memory:
            seconds = measure_inference(self._merged, [largest], autocast=self.autocast)
        self._add_seconds([largest], seconds)
        return {
            "weights_bytes": weights,
            "peak_memory_bytes": weights + memory.grown,
            "peak_memory_method": memory.method,
        }

    def _add_seconds(self, batches: Sequence[Mapping[str, Any]], seconds: Sequence[float]) -> None:
        """Add the seconds of some batches, scaled to all batches, to the expected seconds of a round."""
        self._round_seconds += sum(seconds) * _tokens(self.batches) / _tokens(batches)

    def round_seconds(self) -> float:
        """Return the expected seconds of a round of this subject."""
        return self._round_seconds * (1 + WARMUP / len(self.batches))

    def training(self) -> float:
        """Measure training samples/s: forward, backward, clipping and optimizer step."""
        with self._training_as_a_run():
            return _samples(self.batches) / sum(self._train(self.batches))

    def inference(self, batch_size: int | None = None, peft: Literal["merged", "beside", "fused"] = "merged") -> float:
        """Measure inference samples/s.

        Args:
            batch_size: rows per batch; None: as in training.
            peft: "merged" into the weights, where possible; "beside" them, as PEFT computes it; or, for LoRA, "fused"
                into few steps, as in `evaluate` and `predict`.
        """
        model = self._merged if peft == "merged" else self.model
        batches = sample_batches(self.work, len(self.batches), batch_size) if batch_size else self.batches
        with fused_inference(model) if peft == "fused" else nullcontext():
            return _samples(batches) / sum(measure_inference(model, batches, autocast=self.autocast))

    @cached_property
    def _merged(self) -> nn.Module:
        """A copy of the model with PEFT merged into its weights; the model itself where its kind cannot be merged."""
        if not isinstance(self.model, PeftModel) or not kind_named(self.config.peft_type).merges:
            return self.model
        return copy.deepcopy(self.model).merge_and_unload()

    @contextmanager
    def _training_as_a_run(self) -> Iterator[None]:
        """Make training steps inside the block those of a run, which reads stored outputs of frozen blocks."""
        prefix = FrozenPrefix(self.model, blocks=[] if self.build.masked else None)
        with prefix.attached():
            self._cached_rows = self._cached_rows or self._store(prefix)
            prefix.known = self._cached_rows
            with self.build.accelerating(self.work, self.model):
                yield

    def _store(self, prefix: FrozenPrefix) -> CachedRows | None:
        """Store the outputs of the frozen blocks for the rows, and note the speed; None if a run stores none."""
        settings, seen = (
            self.work.prefix_cache,
            self.work.steps * self.work.pace.batch_size * self.work.pace.accumulation,
        )
        if settings is None or not prefix or seen <= self.work.pace.rows:
            return None
        rows = concatenate_datasets(sample_rows(self.work, len(self.batches)))
        training, folder = self.config.training, Path(self._folder.name)
        options: dict[str, Any] = {"batch_size": training.eval_batch_size, "autocast": self.autocast}
        started = time.perf_counter()
        known = cache_prefix(prefix, rows, self.work.collator, settings, folder, **options)
        self._prefix_speed = len(rows) / (time.perf_counter() - started)
        return known

    def _train(self, batches: Sequence[Mapping[str, Any]]) -> list[float]:
        return measure_training(self.model, batches, self.optimizer, **self.work.step_options)


def _samples(batches: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(batch["input_ids"]) for batch in batches)


def _tokens(batches: Sequence[Mapping[str, Any]]) -> int:
    return sum(batch["input_ids"].numel() for batch in batches)


def sample_batches(work: Workspace, steps: int, size: int | None = None) -> list[dict[str, Any]]:
    """Make training batches of a run, each of rows of similar length, padded to the longest.

    Args:
        size: rows per batch; None: the run's batch size.
    """
    return [work.collator(rows.to_list()) for rows in sample_rows(work, steps, size)]


def sample_rows(work: Workspace, steps: int, size: int | None = None) -> list[Dataset]:
    """Select the training rows of some batches, one data set per batch, from all over an epoch.

    Args:
        size: rows per batch; None: the run's batch size.
    """
    size = size or work.config.training.batch_size
    lengths = work.train_rows["length"][:]
    sampler = LengthGroupedSampler(size, lengths=lengths, generator=torch.Generator().manual_seed(work.config.seed))
    order = list(sampler)
    # the sampler puts the longest batch first; take batches all over the epoch
    starts = range(0, max(len(order) - size, 0) + 1, size)
    count = min(steps, len(starts))
    picked = [starts[index * len(starts) // count] for index in range(count)]
    return [work.train_rows.select(order[start : start + size]) for start in picked]


def _plain(work: Workspace) -> Made:
    config = work.config
    return add_peft(work.dense_model(), replace(config, method="plain")), adamw(work)


def _estimation(work: Workspace) -> Made:
    """Make the dense model with all PEFT modules, masks and observers; the masks train in the optimizer's step."""
    model = add_peft(work.dense_model(), work.config)
    return model, estimating(work, model)


def estimating(work: Workspace, model: PeftModel) -> OptimizerFactory:
    """Attach masks and observers to a model; return the factory of an optimizer whose steps train the masks as well."""
    estimator = Estimator(model, override_light(work.config.light, {"estimate": {"length": 10**9}}))
    estimator.start(None)

    def made(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = adamw(work)(parameters)
        optimizer.register_step_pre_hook(lambda *_: estimator.step())
        return optimizer

    return made


def _light(work: Workspace) -> Made:
    return open_peft(work.run.pruned, work.dense_model().model, is_trainable=True), adamw(work)


BUILDS: dict[str, Build] = {
    "plain": Build(_plain),
    "estimation": Build(_estimation, accelerating, masked=True),
    "light": Build(_light, accelerating),
}
"""Subject -> how to make and train it."""


def adamw(work: Workspace) -> Callable[..., torch.optim.Optimizer]:
    """Return the factory of the optimizer that a run uses (AdamW)."""
    decay = work.config.trainer.get("weight_decay", TRAINER_DEFAULTS["weight_decay"])
    return lambda parameters: torch.optim.AdamW(
        parameters, lr=float(work.config.training.learning_rate), weight_decay=decay
    )


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
