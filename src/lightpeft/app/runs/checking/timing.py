"""How long a step takes: real ones, of models of the run's widths with a few blocks, their weights at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from peft import PeftModel

from lightpeft.app.runs.bench import accelerating, adamw, estimating, sample_batches
from lightpeft.app.runs.checking.models import cut_evenly, device, shapes_of, stored_states, with_peft
from lightpeft.app.runs.workspace import Workspace
from lightpeft.models.loading import load_model_config
from lightpeft.profiling.speed import OptimizerFactory, measure_training
from lightpeft.training.prefix import STATES, FrozenPrefix

_FEW, _MORE = 3, 6
"""Blocks of the models that are timed; a step of a deeper one lies on the line through both."""
_TIMED = 3
"""Steps that are timed, of batches of the run."""


def seconds_of_steps(work: Workspace) -> dict[str, float]:
    """Seconds of a step of each training stage, on this machine."""
    depth = load_model_config(work.config.model).get_text_config().num_hidden_layers
    makers: dict[str, Callable[[Workspace, int], float]] = {"plain": _plain_step}
    if work.config.way.prunes:
        makers |= {"estimate": _estimation_step} if work.config.light.chooses else {}
        makers["train"] = _light_step
    if work.config.way.prunes and work.last_steps:
        makers["full width"] = _full_width_step
    return {name: at_depth(partial(step, work), depth) for name, step in makers.items()}


def at_depth(step: Callable[[int], float], depth: int) -> float:
    """A step of a model so deep, from one or two that are less so."""
    if depth <= _MORE:
        return step(depth)
    few, more = step(_FEW), step(_MORE)
    return more + (depth - _MORE) * max(0.0, more - few) / (_MORE - _FEW)


def _plain_step(work: Workspace, blocks: int) -> float:
    model = with_peft(work, replace(work.config, method="plain"), on=device(), blocks=blocks)
    return _timed(work, model, sample_batches(work, _TIMED), adamw(work))


def _estimation_step(work: Workspace, blocks: int) -> float:
    model = with_peft(work, work.config, on=device(), blocks=blocks)
    optimizer = estimating(work, model)
    with accelerating(work, model):
        return _timed(work, model, sample_batches(work, _TIMED), optimizer)


def _full_width_step(work: Workspace, blocks: int) -> float:
    model = with_peft(work, work.config, on=device(), blocks=blocks)
    with accelerating(work, model):
        return _timed(work, model, sample_batches(work, _TIMED), adamw(work))


def _light_step(work: Workspace, blocks: int) -> float:
    model = with_peft(work, work.config, on=device(), blocks=blocks)
    cut_evenly(model, work.config.light)
    prefix = FrozenPrefix(model)
    with prefix.attached(), accelerating(work, model):
        batches = []
        for batch in sample_batches(work, _TIMED):
            states = stored_states(work, prefix, shapes_of(batch))
            batches.append(batch if states is None else {**batch, STATES: states})
        return _timed(work, model, batches, adamw(work))


def _timed(work: Workspace, model: PeftModel, batches: Any, optimizer: OptimizerFactory) -> float:
    return median(measure_training(model, batches, optimizer, warmup=1, **work.step_options))
