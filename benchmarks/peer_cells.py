"""The process of a cell of `peers.py`, where that is not `lightpeft run` alone."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peer_methods import PEERS, Peer
from peer_pruning import Goal, goal_of
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from lightpeft.app.evaluation.scores import scores_of, values_of
from lightpeft.app.folders.stored_config import stored_config
from lightpeft.app.runs import pipeline
from lightpeft.app.runs.pipeline import Workspace
from lightpeft.config import RunConfig
from lightpeft.config.validation import from_dict
from lightpeft.errors import LightPeftError
from lightpeft.files import write_json
from lightpeft.models.loading import quiet_libraries

CURVE = "curve.json"
"""In the run's folder: what was seen of the test rows in training, if that was asked for."""


def run(config: RunConfig, *, peer: str, goal: Mapping[str, Any] | None = None, curve: int = 0) -> None:
    """Run the cell of a peer, from the data to metrics.json.

    Args:
        goal: how much has to go, where the peer is one that removes something; None: what the budget in the config
            would remove.
        curve: points of training at which the test rows are looked at.
    """
    work, known = pipeline.prepare(config), PEERS[peer]
    watching = Curve(partial(quality, work), curve, work.run.path / CURVE)
    if known.make is None:
        run_watched(work, watching)
    else:
        aim = goal_of(work.dense_model(), config.light) if goal is None else from_dict(Goal, dict(goal))
        run_own(work, known, aim, watching)


def run_watched(work: Workspace, watching: Curve) -> None:
    """Do as `lightpeft run`, with fine-tuning watched."""
    if work.config.method == "light":
        pipeline.estimate(work)
        pipeline.plan(work)
        pipeline.prune(work)
    pipeline.train(work, [watching])
    pipeline.evaluate(work)


def run_own(work: Workspace, peer: Peer, goal: Goal, watching: Curve) -> None:
    """Train the model that the peer makes, as a plain run would train its own, and measure it.

    Not every such model could be loaded by what is saved of it. So it is measured while it is in memory, and a result
    whose process ended before that is made again.
    """
    assert peer.make is not None
    shutil.rmtree(work.run.result, ignore_errors=True)
    set_seed(work.config.seed)
    model: Any = peer.make(work, work.dense_model(), goal)
    with peer.accelerating(work, model):
        pipeline.train(without_cache(work), [watching], model)
    write_json(work.run.metrics, report(work, model, goal))


def without_cache(work: Workspace) -> Workspace:
    """The run, whose frozen blocks are computed in every epoch: by habit nobody stores what they give."""
    training = replace(work.config.training, prefix_cache="off")
    return replace(work, config=replace(work.config, training=training))


def report(work: Workspace, model: Any, goal: Goal) -> dict[str, Any]:
    """The content of metrics.json for a model that is in memory."""
    scores = scores_of(pipeline.measure(work, model), work.task)
    found = pipeline.report(work, model, scores)
    removed = 1 - found["parameters"]["base"] / goal.base
    return {**found, "parameters": {**found["parameters"], "base_dense": goal.base, "base_removed_ratio": removed}}


def quality(work: Workspace, model: Any) -> float:
    """The main metric on the test rows."""
    outcome = pipeline.measure(work, model)[""]
    return values_of(outcome, work.task)[work.task.main_metric]


class Curve(TrainerCallback):
    """Quality at evenly spaced steps of the training it watches; the time of measuring is kept apart."""

    def __init__(self, measure: Callable[[nn.Module], float], points: int, file: Path) -> None:
        """
        Args:
            points: how many; 0: nothing is looked at, and nothing written.
            file: JSON file for `points`, (seconds of training, quality) each, `spent`, the seconds of measuring, and
                `lasted`, those of the whole training without measuring.
        """
        self.measure, self.count, self.file = measure, points, file
        self.points: list[tuple[float, float]] = []
        self.spent = 0.0
        self.started, self.first_step = 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started, self.first_step = time.perf_counter(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        steps = state.max_steps - self.first_step
        due = {self.first_step + round(steps * point / self.count) for point in range(1, self.count + 1)}
        if state.global_step in due:
            now = time.perf_counter()
            self.points.append((now - self.started - self.spent, self.measure(kwargs["model"])))
            self.spent += time.perf_counter() - now

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        lasted = time.perf_counter() - self.started - self.spent
        if self.count:
            write_json(self.file, {"points": self.points, "spent": self.spent, "lasted": lasted})


def main(folder: str, arguments: str) -> None:
    """Run the cell whose config lies in a folder."""
    run(stored_config(Path(folder)), **json.loads(arguments))


if __name__ == "__main__":
    quiet_libraries()
    try:
        main(*sys.argv[1:])
    except LightPeftError as error:
        sys.exit(f"lightpeft: {error}")
