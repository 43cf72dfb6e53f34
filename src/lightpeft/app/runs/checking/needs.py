"""What a run needs: memory and floating-point operations of its stages; what to change where it is too much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch
from rich.filesize import decimal

from lightpeft.app.runs.checking.models import check_in_memory
from lightpeft.app.runs.checking.removal import expected_light, expected_removal
from lightpeft.app.runs.checking.stages import Rehearsal
from lightpeft.app.runs.workspace import Workspace
from lightpeft.machine import accelerator
from lightpeft.profiling.rehearsal import Holding
from lightpeft.profiling.surroundings import hardware


@dataclass(frozen=True)
class Need:
    """A stage of a run."""

    holding: Holding
    steps: int
    """Optimizer steps; of evaluation, batches."""

    @property
    def flops(self) -> int:
        """Of the stage, with every batch as long as the longest."""
        return self.holding.flops * self.steps


@dataclass(frozen=True)
class Check:
    """What a run needs."""

    stages: dict[str, Need]
    """By name, in order; "plain" is plain PEFT on the whole model, beside which the others are seen."""
    rows: int
    """Of a batch."""
    tokens: int
    """Of its longest row."""
    prefix_bytes: int
    """What the outputs of frozen blocks take, in memory or on disk; 0 where none are kept."""
    available: int
    """Bytes of memory of the device."""
    removal: list[str]
    """What the run is going to remove, and why; where it stops."""

    @property
    def largest(self) -> str:
        """The stage of the run that needs most memory."""
        return max(self.own, key=lambda name: self.stages[name].holding.total)

    @property
    def own(self) -> list[str]:
        """The stages of the run itself."""
        return [name for name in self.stages if name != "plain"] or ["plain"]

    @property
    def fits(self) -> bool:
        """Whether the run's stages fit into the device's memory."""
        return self.stages[self.largest].holding.total <= self.available

    @property
    def left(self) -> int:
        """Bytes of the device's memory beside the weights and what trains, in the stage that has most of these."""
        return self.available - max(self.stages[name].holding.fixed for name in self.own)

    @property
    def flops_of_plain(self) -> float:
        """What the run's training computes, as a part of plain PEFT's."""
        return sum(self.stages[name].flops for name in self.own if name != "evaluate") / self.stages["plain"].flops

    def summary(self) -> Iterator[str]:
        """Whether it fits, whether it pays, and what to change, a line each."""
        yield from self.removal
        need, room = self.stages[self.largest].holding.total, f"{self.available / 2**30:.1f} GiB"
        verdict = "fits into" if self.fits else "does not fit into"
        yield f"the largest stage, {self.largest}, takes {need / 2**30:.1f} GiB and {verdict} the {room} that there are"
        if not self.fits and self.left > 0:
            yield "  set training.gradient_checkpointing, or smaller batches with training.gradient_accumulation"
        elif self.left <= 0:
            alone = f"weights, and what trains, take {(self.available - self.left) / 2**30:.1f} GiB by themselves"
            yield f"  {alone}, whatever the batch: set model.dtype, model.quantization or model.low_memory"
        if self.prefix_bytes:
            yield f"the prefix cache takes {decimal(self.prefix_bytes)} (training.prefix_cache says where)"
        if "train" in self.stages:
            together = "estimation and training compute" if "estimate" in self.stages else "training computes"
            yield f"{together} {self.flops_of_plain:.2f} of what plain PEFT does"

    def facts(self) -> dict[str, Any]:
        """The same as plain data."""
        stages = {name: {**asdict(need), "total": need.holding.total} for name, need in self.stages.items()}
        found = {name: getattr(self, name) for name in ("largest", "fits", "flops_of_plain")}
        return {**asdict(self), "stages": stages, **found, "hardware": hardware()}


def check(work: Workspace, available: int | None = None) -> Check:
    """Go through the stages of a run on its longest batch.

    Args:
        available: bytes of memory that the run may take; None: what the accelerator, or without one the machine, has.

    Raises:
        LightPeftError: the model cannot be pruned, PEFT cannot be put on it, or the budget cannot be met; its weights
            are in few bits, on disk, or train all.
    """
    check_in_memory(work)
    available = memory_of_device() if available is None else available
    removal = list(expected_removal(work)) if work.config.way.prunes else []
    if work.config.way.prunes:
        work = replace(work, config=replace(work.config, light=expected_light(work)))
    rehearsal = Rehearsal(work)
    stages, prefix = _own_stages(work, rehearsal)
    stages = {"plain": Need(rehearsal.plain(), work.steps), **stages}
    rows, tokens = rehearsal.shapes["input_ids"][0][:2]
    return Check(stages, rows, tokens, prefix, available, removal)


def _own_stages(work: Workspace, rehearsal: Rehearsal) -> tuple[dict[str, Need], int]:
    """The stages of the run itself, beside plain PEFT, and the bytes of its prefix cache."""
    if not work.config.way.prunes:
        return {}, 0
    length, last = work.stage.steps, work.last_steps
    training, evaluation, prefix = rehearsal.light()
    stages = {"estimate": Need(rehearsal.estimation(), length)} if length else {}
    stages["train"] = Need(training, work.steps - length - last)
    if last:
        stages["full width"] = Need(rehearsal.full_width(), last)
    stages["evaluate"] = Need(evaluation, -(-len(work.test_rows) // work.config.training.eval_batch_size))
    return stages, prefix


def memory_of_device() -> int:
    """Bytes of the accelerator, or without one of the machine."""
    device = accelerator()
    if device is not None and device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)
