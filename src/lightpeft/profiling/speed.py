"""Seconds of training steps and of inference."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice, pairwise
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from lightpeft.errors import require
from lightpeft.machine import autocasting
from lightpeft.models.batches import without_labels
from lightpeft.models.patching import in_mode
from lightpeft.profiling.live import Batch, device_of, loss_of, moved, trainable

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
"""Makes an optimizer of the parameters to train."""


WARMUP = 2
"""Steps before those that are timed; the first one allocates the optimizer's state."""


def measure_training(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer_factory: OptimizerFactory = AdamW,
    *,
    steps: int | None = None,
    warmup: int = WARMUP,
    autocast: torch.dtype | None = None,
    max_grad_norm: float = 1.0,
) -> list[float]:
    """Seconds of each training step: copy to the device, forward, backward, clipping, optimizer step.

    The model really trains: its trainable weights change, and gradients are gone afterwards.

    Args:
        batches: model inputs with `labels`; the timed steps start at the first and go round.
        optimizer_factory: makes the optimizer of the list of trainable parameters.
        steps: timed steps; unset: one pass over `batches`.
        warmup: steps before those, not timed.
        autocast: half precision of the forward pass; None: that of the weights. In float16 the loss is scaled.
        max_grad_norm: gradient norm clipping; 0 switches it off.

    Raises:
        LightPeftError: no batches, no trainable parameters, no loss, or counts out of range.
    """
    parameters = trainable(model)
    require(parameters, "nothing to train: no parameter of the model requires a gradient")
    optimizer = optimizer_factory(parameters)
    device = device_of(model)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast is torch.float16)

    def step(batch: Batch) -> None:
        with autocasting(device, autocast):
            loss = loss_of(model, moved(batch, device))
        torch.autograd.backward(scaler.scale(loss))
        if max_grad_norm:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    with in_mode(model, training=True):
        return timed(step, batches, steps, warmup, device)


def measure_inference(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    steps: int | None = None,
    warmup: int = WARMUP,
    autocast: torch.dtype | None = None,
) -> list[float]:
    """Seconds of each forward pass in eval mode without gradients; labels are left out, so no loss is computed.

    Args: as in `measure_training`.

    Raises:
        LightPeftError: no batches, or counts out of range.
    """
    device = device_of(model)

    def step(batch: Batch) -> None:
        with autocasting(device, autocast):
            model(**moved(without_labels(batch), device))

    with in_mode(model, training=False), torch.no_grad():
        return timed(step, batches, steps, warmup, device)


def timed(
    step: Callable[[Batch], None], batches: Sequence[Batch], steps: int | None, warmup: int, device: torch.device
) -> list[float]:
    """Seconds of each call of `step`, after those that warm up; on CUDA those of the device, which the host waits for.

    Raises:
        LightPeftError: no batches, or counts out of range.
    """
    steps = len(batches) if steps is None else steps
    require(len(batches) > 0, "no batches to measure with; give at least one")
    require(steps >= 1, f"steps is {steps}; measure at least 1")
    require(warmup >= 0, f"warmup is {warmup}; it cannot be negative")
    for batch in islice(cycle(batches), warmup):
        step(batch)
    marks = [_mark(device)]
    for batch in islice(cycle(batches), steps):
        step(batch)
        marks.append(_mark(device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) / 1000 for start, end in pairwise(marks)]
    return [end - start for start, end in pairwise(marks)]


def _mark(device: torch.device) -> Any:
    """A moment: an event in the stream on CUDA, where the host runs ahead of the device, and the clock elsewhere."""
    if device.type != "cuda":
        return time.perf_counter()
    with torch.cuda.device(device):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
    return event
