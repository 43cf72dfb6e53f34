"""Plain PEFT beside the light model: speed, memory and FLOPs, each subject in a process of its own, in alternation.

The same batches, padding, batch size and data type go to all. Only one process computes at a time, so that on a noisy
machine a drift falls on all subjects alike; ratios are taken within rounds.
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
from lightpeft.peft_kinds.sites.answering import fused_answers
from lightpeft.plans.records import EstimationRecord
from lightpeft.profiling.comparing import in_rounds, ratio, summarize
from lightpeft.profiling.flops import count_flops, kv_cache_bytes
from lightpeft.profiling.memory import PeakMemory, weights_bytes
from lightpeft.profiling.speed import WARMUP, OptimizerFactory, measure_inference, measure_training
from lightpeft.profiling.surroundings import hardware
from lightpeft.prune.estimation import Estimator
from lightpeft.training.acceleration import light_steps
from lightpeft.training.arguments import USUAL
from lightpeft.training.prefix import CachedRows, FrozenPrefix, cache_prefix

Made = tuple[nn.Module, Callable[..., torch.optim.Optimizer]]
"""A model, and the factory of its optimizer."""
SUBJECTS = ("plain", "estimation", "light")
"""Plain PEFT on the dense model, the estimation stage (if the run has one), and the pruned model."""
_INFERRING = ("plain", "light")
"""Those of them that infer; estimation is a stage of training."""
_WHAT = {"fixed": "memory and FLOPs", "serving": "inference memory"}
"""Methods of `Subject` that measure what does not vary, as people call it."""
ROUNDS, STEPS = 3, 10
"""Rounds, and batches a round, that are usual."""
_MOST = 10_000
"""Rounds, and batches a round, that are still a measurement."""
_MEASURED_STEPS = 3
"""Training steps of the memory measurement: the second allocates nothing new but the optimizer's state."""


def bench(
    config: RunConfig, rounds: int = ROUNDS, steps: int = STEPS, json: str | Path | None = None
) -> dict[str, Any]:
    """Measure the run of `config` against plain PEFT, and write the result to `json`, anew after each round.

    A run that has not been pruned yet is estimated, planned and pruned first.

    Args:
        rounds: alternations; medians and quartiles are over rounds.
        steps: batches a round.

    Returns:
        By subject: samples/s in training and inference (merged weights where they can be merged), peak
        memory of both, FLOPs; ratios to plain PEFT; and the end-to-end time of a whole run computed from the medians,
        estimation included; `rounds` that are over, `of_rounds` that were asked for.

    Raises:
        LightPeftError: bad input, or a measurement failed.
        Stopped: by Ctrl-C; rounds that were over are kept.
    """
    require(rounds >= 1 and steps >= 1, "bench.rounds and bench.steps start at 1")
    require(max(rounds, steps) <= _MOST, f"bench.rounds and bench.steps can be at most {_MOST:,}")
    require(json is None or not Path(json).is_dir(), f"--json {json} is a folder; give a file")
    in_memory = "bench compares models in memory; switch model.low_memory off, where the base fits"
    require(not config.model.low_memory, in_memory)
    config = replace(config, method="light")
    work = prepare(config)
    pipeline.estimate(work)
    pipeline.plan(work)
    pipeline.prune(work)
    place = Path(json or work.run.path / "bench.json")
    report: dict[str, Any] = {}
    try:
        for fixed, values in _measured(config, rounds, steps):
            report = _report(work, fixed, values) | {"of_rounds": rounds, "steps": steps}
            write_json(place, report)
    except KeyboardInterrupt as stop:
        done = f"{place} has {rounds_in_words(report['rounds'], rounds)}" if report else "no round was over"
        raise Stopped(f"stopped; {done}; the same command measures anew", report) from stop
    return report


class Stopped(KeyboardInterrupt):
    """Somebody stopped a measurement."""

    def __init__(self, line: str, report: dict[str, Any]) -> None:
        """
        Args:
            line: says what there is of it.
            report: what `bench` gives, of the rounds that were over; empty: none was.
        """
        super().__init__(line)
        self.report = report


def rounds_in_words(done: int, asked: int | None = None) -> str:
    """Alternations of a measurement: 3 rounds; of one that was stopped, 1 of 3 rounds."""
    of = f" of {asked}" if asked is not None and done < asked else ""
    return f"{done}{of} round{'s' * (done != 1 or bool(of))}"


def _report(work: Workspace, fixed: Mapping[str, dict[str, Any]], values: _Values) -> dict[str, Any]:
    """What `bench` gives, of the rounds that are over."""
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


def _measured(config: RunConfig, rounds: int, steps: int) -> Iterator[tuple[dict[str, dict[str, Any]], _Values]]:
    """Round by round what does not vary, by subject, and what all rounds have measured so far."""
    names = [name for name in SUBJECTS if name in _INFERRING or config.light.chooses]
    total = (1 + rounds) * (len(names) + len(_INFERRING))
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(Subject, name, config, steps)) for name in names}
        progress = StepProgress(total, 0, "measurements")

        def measuring(what: str, name: str) -> Callable[[], Any]:
            return partial(_shown, progress, workers[name], what, name)

        fixed = {name: measuring("fixed", name)() for name in names}
        for name in _INFERRING:
            fixed[name]["inference"] = measuring("serving", name)()
        seconds = rounds * sum(worker.measure("round_seconds") for worker in workers.values())
        of_batches = f"{rounds_in_words(rounds)} of {steps} batches take about {duration(seconds)}"
        print_line(f"{of_batches}; Ctrl-C keeps the rounds that are over")
        calls = {("training", name): measuring("training", name) for name in names}
        calls |= {("inference", name): measuring("inference", name) for name in _INFERRING}
        values: _Values = {"training": {}, "inference": {}}
        for found in in_rounds(calls, rounds):
            for what, name in calls:
                values[what].setdefault(name, []).append(found[what, name])
            yield fixed, values


def _shown(progress: StepProgress, worker: Worker, what: str, name: str) -> Any:
    """A measurement of a subject, shown as one step."""
    label = f"{name}, {_WHAT.get(what, what)}"
    progress.begin()
    value = worker.measure(what)
    told = f"{value['peak_memory_bytes'] / 2**20:,.0f} MiB" if what in _WHAT else f"{value:,.1f} samples/s"
    progress.end(label, told)
    return value


def accelerating(work: Workspace, model: nn.Module) -> AbstractContextManager[None]:
    """Steps as a light run makes them."""
    config = work.config
    return light_steps(model, config.light, fast=config.training.fast_steps, loss_alone=True)


def by_habit(work: Workspace, model: nn.Module) -> AbstractContextManager[None]:
    """Steps as PEFT, transformers and PyTorch make them."""
    return nullcontext()


@dataclass(frozen=True)
class Build:
    """How a subject is made and trains; it goes to another process, so that all of it can be pickled."""

    make: Callable[[Workspace], Made]
    accelerating: Callable[[Workspace, nn.Module], AbstractContextManager[None]] = by_habit
    """Training is measured inside this context of a run and its model."""
    masked: bool = False
    """Whether masks train, in every block, so that none is frozen."""
    autocast: torch.dtype | None = None
    """Half precision instead of the run's own."""


class Subject:
    """One subject's model and the batches that all subjects share."""

    def __init__(self, build: str | Build, config: RunConfig, steps: int) -> None:
        """
        Args:
            build: what to measure, or its name in `BUILDS`.
            steps: batches a measurement.
        """
        set_seed(config.seed)
        self.config = config
        self.work = prepare(config)
        self.batches = sample_batches(self.work, steps)
        self.build = BUILDS[build] if isinstance(build, str) else build
        self.autocast = self.build.autocast or autocast_dtype(config.training)
        self.model, self.optimizer = self.build.make(self.work)
        self._folder = tempfile.TemporaryDirectory()
        self._known: CachedRows | None = None
        self._prefix_speed: float | None = None
        self._round_seconds = 0.0

    def fixed(self) -> dict[str, Any]:
        """Peak memory of training, FLOPs of one batch and size of the KV cache, which do not vary."""
        with self._as_trained():
            with PeakMemory(self.model) as memory:
                seconds = self._train(self.batches[:_MEASURED_STEPS])
            self._note(self.batches[:_MEASURED_STEPS], seconds)
            flops = count_flops(self.model, max(self.batches, key=lambda batch: batch["input_ids"].numel()))
        return {
            "prefix_samples_per_second": self._prefix_speed,
            "peak_memory_bytes": memory.bytes,
            "peak_memory_method": memory.method,
            "flops": {"forward": flops.forward, "training": flops.training},
            "kv_cache_bytes_per_token": kv_cache_bytes(self.model, self.batches[0]),
        }

    def serving(self) -> dict[str, Any]:
        """Bytes of the weights as they are served, PEFT merged, and with what the largest batch takes beside them."""
        largest = max(self.batches, key=lambda batch: batch["input_ids"].numel())
        weights = weights_bytes(self._merged)
        with PeakMemory(self._merged) as memory:
            seconds = measure_inference(self._merged, [largest], autocast=self.autocast)
        self._note([largest], seconds)
        return {
            "weights_bytes": weights,
            "peak_memory_bytes": weights + memory.grown,
            "peak_memory_method": memory.method,
        }

    def _note(self, batches: Sequence[Mapping[str, Any]], seconds: Sequence[float]) -> None:
        """These batches took so long: what all of them will take in each round."""
        self._round_seconds += sum(seconds) * _tokens(self.batches) / _tokens(batches)

    def round_seconds(self) -> float:
        """Seconds that a round of what was measured once will take, about."""
        return self._round_seconds * (1 + WARMUP / len(self.batches))

    def training(self) -> float:
        """Training samples a second: forward, backward, clipping and optimizer step."""
        with self._as_trained():
            return _samples(self.batches) / sum(self._train(self.batches))

    def inference(self, batch_size: int | None = None, peft: Literal["merged", "beside", "fused"] = "merged") -> float:
        """Inference samples a second.

        Args:
            batch_size: rows a batch; None: as in training.
            peft: merged into the weights, where that can be done; beside them, as PEFT computes it; or, of LoRA, fused
                into few steps, as `evaluate` and `predict` have it.
        """
        model = self._merged if peft == "merged" else self.model
        batches = sample_batches(self.work, len(self.batches), batch_size) if batch_size else self.batches
        with fused_answers(model) if peft == "fused" else nullcontext():
            return _samples(batches) / sum(measure_inference(model, batches, autocast=self.autocast))

    @cached_property
    def _merged(self) -> nn.Module:
        """A copy with PEFT merged into its weights; the model itself where that cannot be done."""
        if not isinstance(self.model, PeftModel) or not kind_named(self.config.peft_type).merges:
            return self.model
        return copy.deepcopy(self.model).merge_and_unload()

    @contextmanager
    def _as_trained(self) -> Iterator[None]:
        """Inside the block steps are those of a run: with the outputs of a frozen prefix, read as a run reads them."""
        prefix = FrozenPrefix(self.model, blocks=[] if self.build.masked else None)
        with prefix.attached():
            self._known = self._known or self._store(prefix)
            prefix.known = self._known
            with self.build.accelerating(self.work, self.model):
                yield

    def _store(self, prefix: FrozenPrefix) -> CachedRows | None:
        """The states of the rows, and how fast those are computed; None where a run would store none."""
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
    """Batches that a run would train on, of similar length, padded to the longest; `size` rows instead of its own."""
    return [work.collator(rows.to_list()) for rows in sample_rows(work, steps, size)]


def sample_rows(work: Workspace, steps: int, size: int | None = None) -> list[Dataset]:
    """The rows of `sample_batches`, one data set a batch."""
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
    """The dense model with all PEFT modules, masks and observers on; the masks train in the optimizer's step."""
    model = add_peft(work.dense_model(), work.config)
    return model, estimating(work, model)


def estimating(work: Workspace, model: PeftModel) -> OptimizerFactory:
    """Attach what estimates to a model; the factory of an optimizer whose steps train the masks as well."""
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
"""Subject -> how it is made and trains."""


def adamw(work: Workspace) -> Callable[..., torch.optim.Optimizer]:
    """The factory of the optimizer that a run uses."""
    decay = work.config.trainer.get("weight_decay", USUAL["weight_decay"])
    return lambda parameters: torch.optim.AdamW(
        parameters, lr=float(work.config.training.learning_rate), weight_decay=decay
    )


def _ratios(
    training: Mapping[str, list[float]], inference: Mapping[str, list[float]], fixed: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Light over plain PEFT, and estimation (if there is one) over plain PEFT; paired by round where rounds exist."""
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
    """Seconds of whole runs of equal steps, from the medians; light counts estimation, surgery and its prefix cache.

    Args:
        prefix_speed: rows a second that the frozen prefix is computed for; None: it is not stored.
    """
    step_seconds = {
        name: work.config.training.batch_size * work.config.training.gradient_accumulation / summarize(values).median
        for name, values in training.items()
    }
    estimation_steps = EstimationRecord.load(work.run.estimation).meta["steps"]
    seconds = work.run.stage_seconds()
    # where they are auto, depth and budget are a part of it
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
