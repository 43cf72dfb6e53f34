"""What a nat of the loss is worth in points of a metric, where a head answers with classes.

Of a classifier that knows how sure it is and errs with probability e among C classes, the cross-entropy rises with e by
ln((1 - e) (C - 1) / e): the derivative of its entropy, if every row is alike. What the metric loses when errors become
more frequent, each kind in proportion, is counted on the answers themselves.
"""

from __future__ import annotations

import math

import numpy as np

from lightpeft.app.tasks.answers import Answers, ClassMetric, class_count
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.metrics import METRICS, accuracy
from lightpeft.models.task_heads import CLASSIFICATION, MULTIPLE_CHOICE

_MORE = 0.01
"""Errors more, as a part of all answers."""
_LEAST_NATS = 1.0
"""Of an error: next to chance, where the entropy is flat, a nat would be worth any number of points."""


def answers_are_classes(task: Task) -> bool:
    """Whether a head picks one of several answers, and the task's main metric counts which are right."""
    metric = METRICS[task.metrics[0]].compute
    return task.head in (CLASSIFICATION, MULTIPLE_CHOICE) and (metric is accuracy or isinstance(metric, ClassMetric))


def points_a_nat(answers: Answers, task: Task) -> float:
    """By how many hundredths of the main metric a model gets worse when its loss rises by a nat, for small rises.

    At least as many as of accuracy.

    Args:
        answers: of the model, to rows whose classes are known.
        task: one whose `answers_are_classes`.
    """
    classes = class_count(answers)
    counts = np.zeros((classes, classes))
    np.add.at(counts, (np.asarray(answers.references, int), np.asarray(answers.predictions, int)), 1)
    right, total = np.trace(counts), counts.sum()
    errors = counts - np.diag(np.diag(counts))
    if not errors.any():  # all kinds alike
        errors = 1.0 - np.eye(classes)
    error = max((total - right) / total, 0.5 / total)
    more = _MORE * total
    fewer = 1 - more / max(right, more)
    worse = np.diag(np.diag(counts)) * fewer + errors / errors.sum() * (total - right + more)
    nats = _MORE * max(_LEAST_NATS, math.log((1 - error) * (classes - 1) / error) if error < 1 else 0.0)
    # a metric that is 0 for answers that are all the same still has much to lose
    lost = max(_MORE, _main(counts, task) - _main(worse, task))
    return 100 * lost / nats


def _main(counts: np.ndarray, task: Task) -> float:
    metric = METRICS[task.metrics[0]].compute
    if isinstance(metric, ClassMetric):
        return metric.of_counts(counts)[task.main_metric]
    return float(np.trace(counts) / counts.sum())
