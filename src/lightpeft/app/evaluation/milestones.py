"""What a run makes of its model: milestones on one sample of test rows, and what there is to worry about, in words."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from lightpeft.app.evaluation.scores import values_of
from lightpeft.app.evaluation.statistics import LEVEL, Interval, compare
from lightpeft.app.tasks.answers import Answers, Outcome
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.respondent import Respondent
from lightpeft.errors import LightPeftError
from lightpeft.plans.records import PrunePlan

MILESTONES = (
    "majority_baseline",
    "base_model",
    "after_estimation",
    "after_pruning",
    "after_pruning_modules",
    "at_full_width",
    "final",
)
"""Moments of a run, in order; the majority baseline is none, but what all of them are held against."""
MOST_ROWS = 256
"""Rows of the sample at most: an accuracy of so many is known to 6 points (95%), for four passes over few rows."""
MOST_WRITTEN = 32
"""The same where every answer is written token by token."""
RAISED = 0.05
"""Part by which a loss has to be higher to be called so: about the standard error of its mean over `MOST_ROWS` rows."""
LOWER_IS_BETTER = ("loss", "mse", "perplexity")
"""Of all other metrics more is better."""

Metrics = dict[str, float]


# -- what is measured ----------------------------------------------------------------------------------------------


def moment_behind(plan: PrunePlan) -> str | None:
    """The moment behind surgery by a plan; None where that leaves the model as it was."""
    if plan.cuts_blocks:
        return "after_pruning"
    return "after_pruning_modules" if plan.cuts_modules else None


def sample(task: Task) -> Dataset:
    """The test rows that a run is watched on, in their order; the same in every run."""
    most = MOST_WRITTEN if task.writes else MOST_ROWS
    drawn = torch.randperm(len(task.test), generator=torch.Generator().manual_seed(0))[:most]
    return task.test.select(sorted(drawn.tolist()))


@dataclass
class Watcher:
    """Asks a model at some moments of a run, and keeps what it answered. No random number is drawn for that."""

    task: Task
    rows: Dataset
    """What `task.encode_test` made of the `sample`."""
    examples: int
    """Rows of the sample."""
    ask: Callable[[nn.Module], Respondent]
    """How rows are fed to a model."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    """Name in `MILESTONES` -> what the model did then."""
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """What all this took, which is no part of a stage."""

    def look(self, name: str, model: nn.Module) -> None:
        """Ask the model; what it cannot answer is a warning, and no reason to end a run."""
        started = time.perf_counter()
        try:
            self.outcomes[name] = self.task.answer(self.ask(model), self.rows)
        except LightPeftError as error:
            self.warnings.append(f"{name.replace('_', ' ')}: {error}")
        self.seconds += time.perf_counter() - started

    def facts(self) -> dict[str, Any]:
        """What a stage leaves in the log: `milestones` (main metric, and the loss if there is one) and `warnings`."""
        milestones = {name: milestone(of_then, self.task) for name, of_then in self.outcomes.items()}
        return {"milestones": milestones, "warnings": self.warnings}


def milestone(of_then: Outcome, task: Task) -> Metrics:
    """The main metric and, where there is one, the loss."""
    values = values_of(of_then, task)
    return {name: values[name] for name in (task.main_metric, "loss") if math.isfinite(values.get(name, math.nan))}


def majority_answers(answers: Answers) -> Answers | None:
    """Always the answer that is right most often (of numbers, the mean); None where nothing is right or wrong."""
    right = [_one_of(reference) for reference in answers.references]
    if None in right:
        return None
    best = float(np.mean(right)) if isinstance(right[0], float) else Counter(right).most_common(1)[0][0]
    probabilities = None
    if answers.probabilities is not None:
        probabilities = np.zeros_like(answers.probabilities)
        probabilities[:, int(best)] = 1
    return Answers([best] * len(answers), answers.references, answers.groups, probabilities)


def majority_score(answers: Answers, task: Task) -> Metrics:
    """The main metric of the majority baseline on the same examples; empty where there is none."""
    constant, name = majority_answers(answers), task.main_metric
    return {} if constant is None else {name: task.score(constant)[name]}


def _one_of(reference: Any) -> Any:
    """One of the right answers; of a question that has none, the empty text."""
    return reference if not isinstance(reference, list) else reference[0] if reference else ""


def course(watcher: Watcher, earlier: Iterable[Mapping[str, Any]]) -> dict[str, Metrics]:
    """Milestones of a whole run in order, as far as they are known: older logs say nothing of them.

    Args:
        watcher: that of the last stage.
        earlier: log entries of the stages before.
    """
    known = [entry["milestones"] for entry in earlier if isinstance(entry.get("milestones"), dict)]
    known.append(watcher.facts()["milestones"])
    if "final" in watcher.outcomes:
        known.append({"majority_baseline": majority_score(watcher.outcomes["final"].answers, watcher.task)})
    found = {name: metrics for milestones in known for name, metrics in milestones.items()}
    return {name: found[name] for name in MILESTONES if found.get(name)}


# -- what is said of it --------------------------------------------------------------------------------------------

REMEDY = "train longer (training.epochs) or at another learning rate, such as three times this one, or on more rows"
MILDER = "train at a lower learning rate, or cut less (light.remove.blocks)"
_RAISERS = {
    "after_pruning": ("the cut", "cut less (light.remove.blocks)"),
    "after_pruning_modules": (
        "the cut of PEFT modules",
        "keep more of them (light.modules)",
    ),
}
"""Milestone -> what went before it, and what makes it cost less."""


def notices(
    watcher: Watcher,
    earlier: Collection[Mapping[str, Any]],
    answers: Answers,
    intervals: Mapping[str, Interval | None],
) -> dict[str, Any]:
    """What metrics.json says of the course of a run.

    Args:
        watcher: that of the last stage, which looked at the result.
        earlier: log entries of the stages before.
        answers: of the result to all test rows.
        intervals: of its metrics.

    Returns:
        `milestones` (`examples` of the sample, and `metrics` by name in `MILESTONES`) and `warnings`, a line each.
    """
    milestones = course(watcher, earlier)
    noted = [entry["warnings"] for entry in (*earlier, watcher.facts()) if isinstance(entry.get("warnings"), list)]
    lines = [str(line) for warnings in noted for line in warnings]
    lines += doubts(answers, watcher.task, intervals.get(watcher.task.main_metric))
    lines += doubts_of_run(watcher, milestones)
    return {"milestones": {"examples": watcher.examples, "metrics": milestones}, "warnings": lines}


def doubts(answers: Answers, task: Task, interval: Interval | None) -> Iterator[str]:
    """What the answers to all test rows tell of any model: one class alone, or no better than the majority baseline.

    Args:
        interval: of the main metric; a model is better than a constant where all of it is.
    """
    constant, name = majority_answers(answers), task.main_metric
    if constant is None or interval is None:
        return
    if _collapsed(answers, task):
        yield f"all {len(answers)} test rows are answered {_said(answers.predictions[0], task)}; {REMEDY}"
        return
    value, floor = (task.score(each)[name] for each in (answers, constant))
    gains = [_gain(name, floor, end) for end in interval]
    if min(gains) <= 0:
        shown = f"{name} {value:.4f} ({LEVEL:.0%} interval {interval[0]:.4f} to {interval[1]:.4f})"
        verdict = "is worse than" if max(gains) < 0 else "cannot be told from"
        yield f"{shown} {verdict} the {floor:.4f} of always answering {_said(constant.predictions[0], task)}; {REMEDY}"


def doubts_of_run(watcher: Watcher, milestones: Mapping[str, Metrics]) -> Iterator[str]:
    """What the course of a run tells: less than the untouched base, or a loss that the cut raised and left there.

    Args:
        watcher: that of the last stage, which looked at the trained model.
        milestones: of the whole run.
    """
    name, examples = watcher.task.main_metric, f"{watcher.examples} test rows"
    if {"base_model", "final"} <= watcher.outcomes.keys():
        base, trained = (watcher.outcomes[moment].answers for moment in ("base_model", "final"))
        test = compare(base, trained, watcher.task.measures[0])[name]
        if _gain(name, test.first, test.second) < 0 and test.p_value is not None and test.p_value < 1 - LEVEL:
            values = f"{name} {test.second:.4f} on {examples} is worse than the untouched base's {test.first:.4f}"
            yield f"{values} (p = {test.p_value:.2g}); {MILDER}"
    before, end = (milestones.get(moment, {}) for moment in ("after_estimation", "final"))
    moment = next((each for each in _RAISERS if each in milestones), "after_pruning")
    cut, (what, less) = milestones.get(moment, {}), _RAISERS[moment]
    left = min(cut.get("loss", 0), end.get("loss", 0)) > (1 + RAISED) * before.get("loss", math.inf)
    if left and _gain(name, before[name], end[name]) <= 0:  # else it is surer of its mistakes, and makes fewer of them
        losses = f"from {before['loss']:.4f} to {cut['loss']:.4f}, and training left it at {end['loss']:.4f}"
        yield f"{what} raised the loss on {examples} {losses}; {less}, or train longer (training.epochs)"


def _gain(metric: str, before: float, after: float) -> float:
    """By how much a value is better than another one."""
    return before - after if metric in LOWER_IS_BETTER else after - before


def _collapsed(answers: Answers, task: Task) -> bool:
    """Whether one class is answered only, and rows are so many that among the right answers others would be, too."""
    if not task.labels or len(set(answers.predictions)) > 1:
        return False
    share = Counter(answers.references).most_common(1)[0][1] / len(answers)
    return bool(share ** len(answers) < 1 - LEVEL)


def _said(answer: Any, task: Task) -> str:
    """An answer, for people."""
    if isinstance(answer, float):
        return f"the mean, {answer:.4g}"
    if isinstance(answer, int):
        return f'"{task.labels[answer]}"' if task.labels else f"option {answer + 1}"
    return f'"{answer}"'
