"""Memory and floating-point operations of a run's stages, and the settings to change where they are too much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch

from lightpeft.app.runs.checking.models import check_in_memory
from lightpeft.app.runs.checking.removal import expected_light, expected_removal
from lightpeft.app.runs.checking.stages import Rehearsal
from lightpeft.app.runs.workspace import Workspace
from lightpeft.console.progress import in_bytes
from lightpeft.machine import accelerator
from lightpeft.profiling.rehearsal import Holding
from lightpeft.profiling.surroundings import hardware


@dataclass(frozen=True)
class Need:
    """Memory and computation of one stage of a run."""

    holding: Holding
    steps: int
    """Optimizer steps of the stage; of evaluation, batches."""

    @property
    def flops(self) -> int:
        """Floating-point operations of the stage, as if every batch were as long as the longest."""
        return self.holding.flops * self.steps


@dataclass(frozen=True)
class Check:
    """Memory and computation of all stages of a run."""

    stages: dict[str, Need]
    """Stage name -> its needs, in order; "plain" is plain PEFT on the whole model, for comparison."""
    rows: int
    """Rows of a batch."""
    tokens: int
    """Tokens of the longest row."""
    prefix_bytes: int
    """Bytes of the stored outputs of frozen blocks, in memory or on disk; 0 where none are stored."""
    available: int
    """Bytes of memory of the device."""
    removal: list[str]
    """Lines that say how much the run will remove and why, and where it may stop early."""

    @property
    def largest(self) -> str:
        """Name of the run's stage that needs most memory."""
        return max(self.own, key=lambda name: self.stages[name].holding.total)

    @property
    def own(self) -> list[str]:
        """Names of the run's own stages, without the comparison."""
        return [name for name in self.stages if name != "plain"] or ["plain"]

    @property
    def fits(self) -> bool:
        """True if the largest stage fits into the device's memory."""
        return self.stages[self.largest].holding.total <= self.available

    @property
    def left(self) -> int:
        """Bytes of the device's memory left beside weights and optimizer state, in the stage with most of these."""
        return self.available - max(self.stages[name].holding.fixed for name in self.own)

    @property
    def flops_of_plain(self) -> float:
        """Floating-point operations of the run's training over those of plain PEFT's."""
        return sum(self.stages[name].flops for name in self.own if name != "evaluate") / self.stages["plain"].flops

    def summary(self) -> Iterator[str]:
        """Yield lines: what is removed, whether the run fits into memory, what to change, and its computation."""
        yield from self.removal
        need, room = self.stages[self.largest].holding.total, f"{self.available / 2**30:.1f} GiB"
        verdict = "fits into" if self.fits else "does not fit into"
        yield f"the largest stage, {self.largest}, takes {need / 2**30:.1f} GiB and {verdict} the available {room}"
        if not self.fits and self.left > 0:
            yield "  set training.gradient_checkpointing, or a smaller batch with training.gradient_accumulation"
        elif self.left <= 0:
            alone = f"weights and optimizer state take {(self.available - self.left) / 2**30:.1f} GiB"
            yield f"  {alone} at any batch size: set model.dtype, model.quantization or model.low_memory"
        if self.prefix_bytes:
            yield f"the prefix cache takes {in_bytes(self.prefix_bytes)} (training.prefix_cache: memory, file or off)"
        if "train" in self.stages:
            together = "estimation and training compute" if "estimate" in self.stages else "training computes"
            yield f"{together} {self.flops_of_plain:.2f} times the floating-point operations of plain PEFT"

    def facts(self) -> dict[str, Any]:
        """Return all numbers and the hardware as plain data for JSON."""
        stages = {name: {**asdict(need), "total": need.holding.total} for name, need in self.stages.items()}
        found = {name: getattr(self, name) for name in ("largest", "fits", "flops_of_plain")}
        return {**asdict(self), "stages": stages, **found, "hardware": hardware()}


def check(work: Workspace, available: int | None = None) -> Check:
    """Compute the needs of each stage of a run from its longest batch, on tensors without storage.

    Args:
        available: bytes of memory that the run may take; None: all memory of the accelerator or, without one, of the
            machine.

    Raises:
        LightPeftError: the model cannot be pruned, PEFT cannot be put on it, or the budget cannot be met; its weights
            are quantized, on disk, or all train.
    """
    check_in_memory(work)
    available = memory_of_device() if available is None else available
    removal = list(expected_removal(work)) if work.config.method_spec.prunes else []
    if work.config.method_spec.prunes:
        work = replace(work, config=replace(work.config, light=expected_light(work)))
    rehearsal = Rehearsal(work)
    stages, prefix = _own_stages(work, rehearsal)
    stages = {"plain": Need(rehearsal.plain(), work.steps), **stages}
    rows, tokens = rehearsal.shapes["input_ids"][0][:2]
    return Check(stages, rows, tokens, prefix, available, removal)


def _own_stages(work: Workspace, rehearsal: Rehearsal) -> tuple[dict[str, Need], int]:
    """Compute the needs of the run's own stages, and the bytes of its prefix cache."""
    if not work.config.method_spec.prunes:
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
    """Return the bytes of memory of the accelerator or, without one, of the machine."""
    device = accelerator()
    if device is not None and device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)
