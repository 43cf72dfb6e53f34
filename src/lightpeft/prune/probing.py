"""Probes: what training wins back of a cut, seen on copies of the model that train for a few steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from lightpeft.config import LightConfig
from lightpeft.console.bars import progress
from lightpeft.machine import autocasting, random_apart
from lightpeft.models.patching import in_mode
from lightpeft.plans.records import PrunePlan
from lightpeft.profiling.live import Batch, device_of, loss_of, losses_of, moved, trainable
from lightpeft.prune.search_cost import SearchCost
from lightpeft.prune.surgery import cut_copy
from lightpeft.training.acceleration import light_steps

_WARMUP = 0.1
"""Part of a probe's steps."""


@dataclass(frozen=True)
class Probe:
    """How copies train, and what they are measured on."""

    light: LightConfig
    train: Sequence[Batch]
    """Batches with labels."""
    rows: Sequence[int]
    """Numbers of rows that it does not train on."""
    held: Sequence[Batch]
    """Batches of these; small ones, whose differences say how sure a difference is."""
    rate: float
    """Peak learning rate: it rises over a few steps, and falls to 0 on a line."""
    accumulation: int = 1
    """Batches a step."""
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    """0: gradients are not clipped."""
    autocast: torch.dtype | None = None
    """Half precision of training and measuring."""
    fast: bool = True
    """Whether the steps are the faster ones."""
    few: int | None = None
    """How many of the held batches tell how much the loss rises by a cut; None: all."""
    cost: SearchCost | None = None
    """What a search takes that asks it; None: whatever it takes."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(self.train) // self.accumulation

    def losses(self, model: PeftModel, plan: PrunePlan | None) -> Tensor:
        """Losses of the held batches when a copy has been cut and has trained: [batches], float64.

        PEFT modules keep all of their ranks. The model, and random numbers, stay as they are.

        Args:
            plan: None: nothing is cut.

        Raises:
            LightPeftError: the copy gives no loss, or its losses are not finite.
        """
        with random_apart(device_of(model)):
            torch.manual_seed(0)
            shadow = cut_copy(model, plan)
            self._train(shadow)
            return losses_of(shadow, self.held, self.autocast)

    def _train(self, model: PeftModel) -> None:
        device, parameters = device_of(model), trainable(model)
        optimizer = torch.optim.AdamW(parameters, lr=self.rate, weight_decay=self.weight_decay)
        schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(_WARMUP * self.steps), self.steps)
        scaler = torch.amp.GradScaler(device.type, enabled=self.autocast is torch.float16)
        acceleration = light_steps(model, self.light, fast=self.fast, loss_alone=True)
        with in_mode(model, training=True), acceleration:
            steps = progress(self.train, len(self.train), "a copy trains")
            for number, batch in enumerate(steps, start=1):
                with autocasting(device, self.autocast):
                    loss = loss_of(model, moved(batch, device)) / self.accumulation
                scaler.scale(loss).backward()
                if number % self.accumulation:
                    continue
                if self.max_grad_norm:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                optimizer.zero_grad()
