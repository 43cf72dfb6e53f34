"""Rehearse the stages of a run (model, PEFT modules, masks, cut and steps) on tensors without storage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from peft import PeftModel

from lightpeft.app.evaluation.respondent import MOST_LOGIT_BYTES
from lightpeft.app.runs.checking.models import (
    cut_evenly,
    device,
    shapes_of,
    store_bytes_of,
    stored_states,
    with_peft,
)
from lightpeft.app.runs.subject import accelerating, adamw, estimating
from lightpeft.app.runs.workspace import Workspace
from lightpeft.app.tasks.tokens import PADDED_TO
from lightpeft.compat.stand_ins import StorageWatch
from lightpeft.machine import autocast_dtype
from lightpeft.models.all_weights import train_all
from lightpeft.models.head import lone_head, skip_head
from lightpeft.profiling.rehearsal import Holding, rehearse_inference, rehearse_training, rehearsing
from lightpeft.profiling.speed import OptimizerFactory
from lightpeft.training.prefix import STATES, FrozenPrefix


class Rehearsal:
    """Memory and computation of the stages of a run on its longest batch, computed on tensors without storage."""

    def __init__(self, work: Workspace) -> None:
        self.work = work
        batch = longest_batch(work, work.training_collator)
        self.shapes, self._labeled = shapes_of(batch), _labeled(batch)
        self._options = {"lengths": lengths_of(work), **work.step_options}

    def plain(self) -> Holding:
        """Rehearse training steps of plain PEFT."""
        model = with_peft(self.work, replace(self.work.config, method="plain"))
        with rehearsing(model, device(), self._labeled) as watch:
            return self._steps(model, watch, adamw(self.work), nullcontext())

    def estimation(self) -> Holding:
        """Rehearse steps of estimation; with `light.train: all`, those in which all weights train."""
        model = with_peft(self.work, self.work.config)
        if self.work.config.light.train == "all":
            train_all(model)
        with rehearsing(model, device(), self._labeled) as watch:
            return self._steps(model, watch, estimating(self.work, model), accelerating(self.work, model))

    def full_width(self) -> Holding:
        """Rehearse the last steps at full width (`light.after.full_width_steps`): the whole model with PEFT."""
        model = with_peft(self.work, self.work.config)
        with rehearsing(model, device(), self._labeled) as watch:
            return self._steps(model, watch, adamw(self.work), accelerating(self.work, model))

    def _steps(self, model: PeftModel, watch: StorageWatch, optimizer: OptimizerFactory, around: Any) -> Holding:
        return rehearse_training(model, watch, self.shapes, optimizer, around, **self._options)

    def light(self) -> tuple[Holding, Holding, int]:
        """Rehearse training steps and evaluation of the pruned model; the third value: bytes of its prefix cache."""
        work, model = self.work, with_peft(self.work, self.work.config)
        cut_evenly(model, work.config.light)
        prefix = FrozenPrefix(model)
        with rehearsing(model, device(), self._labeled) as watch:
            with prefix.attached():
                states = stored_states(work, prefix, self.shapes)
                size = 0 if states is None else store_bytes_of(work, states)
                stored = {} if states is None else {STATES: (tuple(states.shape), states.dtype)}
                around, shapes = accelerating(work, model), {**self.shapes, **stored}
                training = rehearse_training(model, watch, shapes, adamw(work), around, **self._options)
            rows = min(work.config.training.eval_batch_size, len(work.test_rows))
            padded = shapes_of(longest_batch(work, work.collator))
            given = {name: ((rows, *shape[1:]), dtype) for name, (shape, dtype) in padded.items()}
            autocast = autocast_dtype(work.config.training)
            head = lone_head(model)
            with skip_head(head):
                evaluation = rehearse_inference(model, watch, given, autocast)
            if head is not None:
                logits = 4 * math.prod(given["input_ids"][0]) * head.out_features
                evaluation = replace(evaluation, activations=evaluation.activations + min(logits, MOST_LOGIT_BYTES))
            return training, evaluation, size


def lengths_of(work: Workspace) -> int:
    """Return the number of different padded lengths of the training rows."""
    return len({-(-length // PADDED_TO) for length in work.train_rows["length"][:]})


def longest_batch(work: Workspace, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> dict[str, Any]:
    """Make a batch of the longest training rows with a collator."""
    lengths = work.train_rows["length"][:]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return collator(work.train_rows.select(order[: work.config.training.batch_size]).to_list())


def _labeled(batch: Mapping[str, Any]) -> float:
    """Return the fraction of a batch's tokens that have a label; 1 where a row has one label."""
    labels = batch["labels"]
    return float((labels != -100).double().mean()) if labels.dim() > 1 else 1.0
