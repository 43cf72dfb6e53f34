"""Milestones of a run: metrics at several moments, on one sample of test rows, and warnings about them."""

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

from lightpeft.app.evaluation.scores import LOWER_IS_BETTER, values_of
from lightpeft.app.evaluation.statistics import LEVEL, Interval, compare
from lightpeft.app.tasks.answers import Answers, Outcome
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.respondent import Respondent
from lightpeft.errors import LightPeftError
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.training.loss_rise import LOWER_RATE, LossRise

MILESTONES = (
    "majority_baseline",
    "base_model",
    "after_estimation",
    "after_pruning",
    "after_pruning_modules",
    "at_full_width",
    "final",
)
"""Moments of a run, in order, after the majority baseline, with which all are compared."""
MOST_SAMPLED_ROWS = 256
"""Most rows of the sample: the 95% interval of an accuracy is 6 points to each side."""
LEAST_SAMPLED_ROWS = 64
"""Rows of the sample in the shortest runs: the interval is 12 points to each side."""
TRAINED_FOR_SAMPLED = 20
"""Rows that a run trains on for each row of the sample; four milestones answer a fifth as many."""
MOST_GENERATED_ROWS = 32
"""Most rows of the sample if a model generates its answers token by token."""
RAISED_LOSS = 0.05
"""Relative rise of a loss that gives a warning: about the standard error of its mean over 256 rows. All
milestones answer the same rows, so a difference between two of them has a smaller error."""

Metrics = dict[str, float]


# -- what is measured ----------------------------------------------------------------------------------------------


def moment_behind(plan: PrunePlan) -> str | None:
    """Return the milestone after surgery by a plan; None if the plan changes nothing."""
    if plan.cuts_blocks:
        return "after_pruning"
    return "after_pruning_modules" if plan.cuts_modules else None


def sample(task: Task, trained: float) -> Dataset:
    """Return the sample of test rows for milestones, in their order; it is the same in every run of this length.

    Args:
        trained: rows that the run trains on, counted once for each epoch.
    """
    affordable = max(LEAST_SAMPLED_ROWS, int(trained) // TRAINED_FOR_SAMPLED)
    most = MOST_GENERATED_ROWS if task.writes else min(MOST_SAMPLED_ROWS, affordable)
    drawn = torch.randperm(len(task.test), generator=torch.Generator().manual_seed(0))[:most]
    return task.test.select(sorted(drawn.tolist()))


@dataclass
class Watcher:
    """Evaluates a model at some moments of a run, and keeps the outcomes. It draws no random number."""

    task: Task
    rows: Dataset
    """The `sample`, encoded by `task.encode_test`."""
    examples: int
    """Number of rows of the sample."""
    ask: Callable[[nn.Module], Respondent]
    """Wraps a model as a `Respondent`."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    """Name in `MILESTONES` -> outcome of the model at that moment."""
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """Time spent here, which does not count as part of a stage."""

    def look(self, name: str, model: nn.Module) -> None:
        """Evaluate the model; a failure becomes a warning and does not end the run."""
        started = time.perf_counter()
        try:
            self.outcomes[name] = self.task.answer(self.ask(model), self.rows)
        except LightPeftError as error:
            self.warnings.append(f"{name.replace('_', ' ')}: {error}")
        self.seconds += time.perf_counter() - started

    def facts(self) -> dict[str, Any]:
        """Return the stage's log entry: `milestones` (main metric, and the loss if there is one) and `warnings`."""
        milestones = {name: milestone(of_then, self.task) for name, of_then in self.outcomes.items()}
        return {"milestones": milestones, "warnings": self.warnings}


def milestone(of_then: Outcome, task: Task) -> Metrics:
    """Return the main metric and, if there is one, the loss of an outcome; values that are not finite are left out."""
    values = values_of(of_then, task)
    return {name: values[name] for name in (task.main_metric, "loss") if math.isfinite(values.get(name, math.nan))}


def majority_answers(answers: Answers) -> Answers | None:
    """Return the majority baseline: the most frequent reference (of numbers, the mean); None without references."""
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
    """Return the main metric of the majority baseline on the same examples; empty without references."""
    constant, name = majority_answers(answers), task.main_metric
    scores = {} if constant is None else task.score(constant)
    return {name: scores[name]} if name in scores else {}


def _one_of(reference: Any) -> Any:
    """Return the first right answer; "" for a question without one."""
    return reference if not isinstance(reference, list) else reference[0] if reference else ""


def course(watcher: Watcher, earlier: Iterable[Mapping[str, Any]]) -> dict[str, Metrics]:
    """Return the known milestones of a whole run, in order; a stage may have none.

    Args:
        watcher: the watcher of the last stage.
        earlier: log entries of the earlier stages.
    """
    known = [entry["milestones"] for entry in earlier if isinstance(entry.get("milestones"), dict)]
    known.append(watcher.facts()["milestones"])
    if "final" in watcher.outcomes:
        known.append({"majority_baseline": majority_score(watcher.outcomes["final"].answers, watcher.task)})
    found = {name: metrics for milestones in known for name, metrics in milestones.items()}
    return {name: found[name] for name in MILESTONES if found.get(name)}


# -- what is said of it --------------------------------------------------------------------------------------------

REMEDY = "train longer (training.epochs), with another learning rate (such as three times this one), or on more rows"
MILDER = "use a lower learning rate, or cut less (light.remove.blocks)"
_CUTS = {
    "after_pruning": ("the cut", "cut less (light.remove.blocks)"),
    "after_pruning_modules": (
        "the cut of PEFT modules",
        "keep more of them (light.modules)",
    ),
}
"""Milestone -> the cut before it, and the remedy against its cost."""


def notices(
    watcher: Watcher,
    earlier: Collection[Mapping[str, Any]],
    answers: Answers,
    intervals: Mapping[str, Interval | None],
) -> dict[str, Any]:
    """Return the milestones and warnings of a run, for metrics.json.

    Args:
        watcher: the watcher of the last stage, with the outcome `final`.
        earlier: log entries of the earlier stages.
        answers: the final model's answers to all test rows.
        intervals: confidence intervals of its metrics.

    Returns:
        `milestones` (`examples`: rows of the sample; `metrics` by name in `MILESTONES`) and `warnings`, one line each.
    """
    milestones = course(watcher, earlier)
    noted = [entry["warnings"] for entry in (*earlier, watcher.facts()) if isinstance(entry.get("warnings"), list)]
    lines = [str(line) for warnings in noted for line in warnings]
    rises = [str(LossRise(**entry["loss_rise"])) for entry in earlier if "loss_rise" in entry]
    interval = intervals.get(watcher.task.main_metric)
    lines += [*rises, *doubts(answers, watcher.task, interval, LOWER_RATE if rises else REMEDY)]
    lines += doubts_of_run(watcher, milestones)
    return {"milestones": {"examples": watcher.examples, "metrics": milestones}, "warnings": lines}


def doubts(answers: Answers, task: Task, interval: Interval | None, remedy: str = REMEDY) -> Iterator[str]:
    """Yield warnings about a model's answers: all of one class, or no better than the majority baseline.

    Args:
        answers: answers to all test rows.
        interval: 95% interval of the main metric; all of it must be better than the baseline.
        remedy: what to do.
    """
    constant, name = majority_answers(answers), task.main_metric
    if constant is None or interval is None:
        return
    if _answers_one_class(answers, task):
        yield f"all {len(answers)} test rows are answered {_format_answer(answers.predictions[0], task)}; {remedy}"
        return
    value, floor = (task.score(each)[name] for each in (answers, constant))
    gains = [_gain(name, floor, end) for end in interval]
    if min(gains) <= 0:
        shown = f"{name} {value:.4f} ({LEVEL:.0%} interval {interval[0]:.4f} to {interval[1]:.4f})"
        verdict = "is worse than" if max(gains) < 0 else "is no better than"
        always = _format_answer(constant.predictions[0], task)
        yield f"{shown} {verdict} the majority baseline {floor:.4f} (always {always}); {remedy}"


def doubts_of_run(watcher: Watcher, milestones: Mapping[str, Metrics]) -> Iterator[str]:
    """Yield warnings about a run: worse than the base model, or a loss that the cut raised for good.

    Args:
        watcher: the watcher of the last stage, with the trained model's outcome.
        milestones: the milestones of the whole run.
    """
    name, examples = watcher.task.main_metric, f"{watcher.examples} test rows"
    if {"base_model", "final"} <= watcher.outcomes.keys():
        base, trained = (watcher.outcomes[moment].answers for moment in ("base_model", "final"))
        test = compare(base, trained, watcher.task.measures[0])[name]
        if _gain(name, test.first, test.second) < 0 and test.p_value is not None and test.p_value < 1 - LEVEL:
            values = f"{name} {test.second:.4f} on {examples} is worse than the base model's {test.first:.4f}"
            yield f"{values} (p = {test.p_value:.2g}); {MILDER}"
    before, end = (milestones.get(moment, {}) for moment in ("after_estimation", "final"))
    moment = next((each for each in _CUTS if each in milestones), "after_pruning")
    cut, (what, less) = milestones.get(moment, {}), _CUTS[moment]
    left = min(cut.get("loss", 0), end.get("loss", 0)) > (1 + RAISED_LOSS) * before.get("loss", math.inf)
    # a better metric at a higher loss: fewer but more confident mistakes
    if left and name in end and _gain(name, before[name], end[name]) <= 0:
        losses = f"from {before['loss']:.4f} to {cut['loss']:.4f}, and training left it at {end['loss']:.4f}"
        yield f"{what} raised the loss on {examples} {losses}; {less}, or train longer (training.epochs)"


def _gain(metric: str, before: float, after: float) -> float:
    """Return the improvement of a metric from `before` to `after`; negative if it got worse."""
    return before - after if metric in LOWER_IS_BETTER else after - before


def _answers_one_class(answers: Answers, task: Task) -> bool:
    """Return True if all answers are one class though chance would give several classes with 95% probability."""
    if not task.labels or len(set(answers.predictions)) > 1:
        return False
    share = Counter(answers.references).most_common(1)[0][1] / len(answers)
    return bool(share ** len(answers) < 1 - LEVEL)


def _format_answer(answer: Any, task: Task) -> str:
    """Return an answer as text for a message."""
    if isinstance(answer, float):
        return f"the mean, {answer:.4g}"
    if isinstance(answer, int):
        return f'"{task.labels[answer]}"' if task.labels else f"option {answer + 1}"
    return f'"{answer}"'
