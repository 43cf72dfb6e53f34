"""Measurement of the seconds of training steps and of inference."""

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
from lightpeft.profiling.live import Batch, device_of, loss_of, move_batch, trainable

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
"""Function from the trainable parameters to an optimizer."""


WARMUP = 2
"""Number of steps before the timed ones; the first step allocates the optimizer state."""


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
    """Measure the seconds of each training step: copy to the device, forward, backward, clipping, optimizer step.

    The trainable weights of the model change, and its gradients are None afterwards.

    Args:
        batches: model inputs with `labels`; the timed steps start at the first one and cycle.
        optimizer_factory: makes the optimizer of the list of trainable parameters.
        steps: number of timed steps; None: one pass over `batches`.
        warmup: number of steps before the timed ones.
        autocast: half precision of the forward pass; None: no autocast. In float16 the loss is scaled.
        max_grad_norm: maximum gradient norm for clipping; 0 switches clipping off.

    Raises:
        LightPeftError: there are no batches, no trainable parameters or no loss, or a count is out of range.
    """
    parameters = trainable(model)
    require(parameters, "no parameter of the model requires a gradient; give a model with trainable parameters")
    optimizer = optimizer_factory(parameters)
    device = device_of(model)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast is torch.float16)

    def step(batch: Batch) -> None:
        with autocasting(device, autocast):
            loss = loss_of(model, move_batch(batch, device))
        torch.autograd.backward(scaler.scale(loss))
        if max_grad_norm:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    with in_mode(model, training=True):
        return time_steps(step, batches, steps, warmup, device)


def measure_inference(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    steps: int | None = None,
    warmup: int = WARMUP,
    autocast: torch.dtype | None = None,
) -> list[float]:
    """Measure the seconds of each forward pass in evaluation mode, without gradients, labels and loss.

    Args:
        batches: model inputs; the timed steps start at the first one and cycle.
        steps: number of timed steps; None: one pass over `batches`.
        warmup: number of steps before the timed ones.
        autocast: half precision of the forward pass; None: no autocast.

    Raises:
        LightPeftError: there are no batches, or a count is out of range.
    """
    device = device_of(model)

    def step(batch: Batch) -> None:
        with autocasting(device, autocast):
            model(**move_batch(without_labels(batch), device))

    with in_mode(model, training=False), torch.no_grad():
        return time_steps(step, batches, steps, warmup, device)


def time_steps(
    step: Callable[[Batch], None], batches: Sequence[Batch], steps: int | None, warmup: int, device: torch.device
) -> list[float]:
    """Measure the seconds of each call of `step` after warmup; on CUDA by events of the device.

    Args:
        step: function of a batch.
        batches: arguments of the calls, used in a cycle.
        steps: number of timed calls; None: one pass over `batches`.
        warmup: number of calls before the timed ones.

    Raises:
        LightPeftError: there are no batches, or a count is out of range.
    """
    steps = len(batches) if steps is None else steps
    require(len(batches) > 0, "no batches to measure with; give at least one")
    require(steps >= 1, f"steps is {steps}; give at least 1")
    require(warmup >= 0, f"warmup is {warmup}; give 0 or more")
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
    """Return a point in time: on CUDA an event in the stream, because the host runs ahead, elsewhere the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    with torch.cuda.device(device):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
    return event
