"""A subject of a benchmark: one model, plain or light, with batches that all subjects share."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from torch import nn
from transformers import set_seed

from lightpeft.app.folders.results import open_peft
from lightpeft.app.runs.workspace import Workspace, prepare
from lightpeft.compat.transformers import LengthGroupedSampler
from lightpeft.config import RunConfig, override_light
from lightpeft.machine import autocast_dtype
from lightpeft.peft_kinds.kinds import kind_named
from lightpeft.peft_kinds.placing import add_peft
from lightpeft.peft_kinds.sites.inference import fused_inference
from lightpeft.profiling.flops import count_flops, kv_cache_bytes
from lightpeft.profiling.memory import PeakMemory, weights_bytes
from lightpeft.profiling.speed import WARMUP, OptimizerFactory, measure_inference, measure_training
from lightpeft.prune.estimation import Estimator
from lightpeft.training.acceleration import light_steps
from lightpeft.training.arguments import TRAINER_DEFAULTS
from lightpeft.training.prefix import CachedRows, FrozenPrefix, cache_prefix

Made = tuple[nn.Module, Callable[..., torch.optim.Optimizer]]
"""A model, and the factory of its optimizer."""
_MEASURED_STEPS = 3
"""Training steps of the memory measurement: the second one allocates nothing new but the optimizer's state."""


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
    """The model of one subject, and the batches that all subjects share: padded, and as the run trains on them."""

    def __init__(self, build: str | Build, config: RunConfig, steps: int) -> None:
        """
        Args:
            build: how to make the model, or a name in `BUILDS`.
            steps: batches per measurement.
        """
        set_seed(config.seed)
        self.config = config
        self.work = prepare(config)
        self.build = BUILDS[build] if isinstance(build, str) else build
        self.autocast = self.build.autocast or autocast_dtype(config.training)
        self.model, self.optimizer = self.build.make(self.work)
        self.batches = sample_batches(self.work, steps)  # the model's maker may have changed how rows are padded
        self.training_batches = [self.work.training_collator(rows.to_list()) for rows in sample_rows(self.work, steps)]
        self._folder = tempfile.TemporaryDirectory()
        self._cached_rows: CachedRows | None = None
        self._prefix_speed: float | None = None
        self._round_seconds = 0.0

    def fixed(self) -> dict[str, Any]:
        """Measure once: peak memory of training, FLOPs of the largest batch, and KV cache bytes per token."""
        with self._training_as_a_run():
            with PeakMemory(self.model) as memory:
                seconds = self._train(self.training_batches[:_MEASURED_STEPS])
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
            return _samples(self.batches) / sum(self._train(self.training_batches))

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
