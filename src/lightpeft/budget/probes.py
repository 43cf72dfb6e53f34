"""Probes: cut copies of the model that train for a few steps, to see how much of the loss they recover."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from lightpeft.budget.cost import SearchCost
from lightpeft.budget.room import SearchRoom, sizes_of
from lightpeft.config import LightConfig
from lightpeft.console.bars import progress
from lightpeft.machine import autocasting, preserve_random_state
from lightpeft.models.patching import in_mode
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.profiling.live import Batch, device_of, loss_of, losses_of, move_batch, trainable
from lightpeft.prune.surgery import cut_copy
from lightpeft.training.acceleration import light_steps
from lightpeft.training.arguments import half_precision
from lightpeft.training.host import Host
from lightpeft.training.rows import batches_of
from lightpeft.training.step_rows import rows_per_step

_WARMUP = 0.1
"""Warmup of the learning rate, as a part of a probe's steps."""


@dataclass(frozen=True)
class Probe:
    """Settings and rows by which copies train and are measured."""

    light: LightConfig
    train: Sequence[Batch]
    """Training batches, with labels."""
    rows: Sequence[int]
    """Numbers of the held-out rows."""
    held: Sequence[Batch]
    """Batches of the held-out rows; many small ones, whose spread gives the standard error."""
    rate: float
    """Peak learning rate; linear warmup, then linear decay to 0."""
    accumulation: int = 1
    """Gradient accumulation: batches per optimizer step."""
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    """Gradient clipping; 0: none."""
    autocast: torch.dtype | None = None
    """Half precision of training and measuring; None: none."""
    fast: bool = True
    """True: train with the faster steps."""
    few: int | None = None
    """Number of held-out batches for the rise right after a cut; None: all."""
    cost: SearchCost | None = None
    """Computation of a search with this probe; None: no limit."""

    @property
    def steps(self) -> int:
        """Optimizer steps of a copy's training."""
        return len(self.train) // self.accumulation

    def losses(self, model: PeftModel, plan: PrunePlan | None) -> Tensor:
        """Cut a copy of the model, train it, and return its losses on the held-out batches: [batches], float64.

        PEFT modules keep all of their ranks. The model and the random state are unchanged.

        Args:
            plan: cut of the copy; None: none.

        Raises:
            LightPeftError: the copy returns no loss, or its losses are not finite.
        """
        with preserve_random_state(device_of(model)):
            torch.manual_seed(0)
            shadow = cut_copy(model, plan)
            self._train(shadow)
            return losses_of(shadow, self.held, self.autocast)

    def _train(self, model: PeftModel) -> None:
        device, parameters = device_of(model), trainable(model)
        optimizer = torch.optim.AdamW(parameters, lr=self.rate, weight_decay=self.weight_decay)
        schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(_WARMUP * self.steps), self.steps)
        scaler = torch.amp.GradScaler(device.type, enabled=self.autocast is torch.float16)
        acceleration = light_steps(model, self.light, fast=self.fast, loss_only=True)
        with in_mode(model, training=True), acceleration:
            steps = progress(self.train, len(self.train), "Probe training")
            for number, batch in enumerate(steps, start=1):
                with autocasting(device, self.autocast):
                    loss = loss_of(model, move_batch(batch, device)) / self.accumulation
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


def make_probe(
    trainer: Host,
    room: SearchRoom,
    light: LightConfig,
    steps: int,
    seen: Collection[int] | None,
    rate: float,
    *,
    fast: bool,
    gone: float = 0.0,
) -> Probe:
    """Make a probe whose copies train as the trainer does, but always with AdamW.

    Args:
        room: size of the run.
        steps: optimizer steps of the whole run.
        seen: numbers of the rows that estimation has trained on; None: not known. Other rows are held out, if there
            are enough of them.
        rate: learning rate of plain PEFT: copies keep all ranks, and `light.rates.scale` is for few.
        fast: train with the faster steps.
        gone: part of the blocks that was dropped before estimation.
    """
    args, rows = trainer.args, trainer.train_dataset
    size = args.train_batch_size * args.world_size
    sizes, cost = sizes_of(room, light, steps, gone)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    unseen = [number for number in drawn if number not in seen] if seen is not None else drawn
    aside = (unseen if len(unseen) >= sizes.aside else drawn)[: sizes.aside]
    apart = set(aside)
    rest = [number for number in drawn if number not in apart]
    batches = partial(batches_of, rows, trainer)
    return Probe(
        light=light,
        train=[*batches(_repeat(rest, sizes.steps * rows_per_step(args)), size)],
        accumulation=args.gradient_accumulation_steps,
        rows=aside,
        held=batches(aside, sizes.in_batch),
        rate=rate,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        autocast=half_precision(args),
        fast=fast,
        few=sizes.few,
        cost=cost,
    )


def _repeat(numbers: Sequence[int], count: int) -> list[int]:
    """Return `count` numbers, starting over from the beginning where they end."""
    return list(islice(cycle(numbers), count))
