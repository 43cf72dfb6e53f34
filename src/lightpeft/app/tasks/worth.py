"""Whether a task's answers are classes, and what a nat of its loss is worth in points of its metric."""

from __future__ import annotations

import numpy as np

from lightpeft.app.tasks.answers import Answers, ClassMetric, class_count
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.metrics import METRICS, accuracy
from lightpeft.budget import worth
from lightpeft.models.task_heads import CLASSIFICATION, MULTIPLE_CHOICE


def answers_are_classes(task: Task) -> bool:
    """Whether a head picks one of several answers, and the task's main metric counts which are right."""
    metric = METRICS[task.metrics[0]].compute
    return task.head in (CLASSIFICATION, MULTIPLE_CHOICE) and (metric is accuracy or isinstance(metric, ClassMetric))


def points_a_nat(answers: Answers, task: Task) -> float:
    """By how many hundredths of the main metric a model gets worse when its loss rises by a nat, for small rises.

    Args:
        answers: of the model, to rows whose classes are known.
        task: one whose `answers_are_classes`.
    """
    right, answered = np.asarray(answers.references, int), np.asarray(answers.predictions, int)
    metric = METRICS[task.metrics[0]].compute
    if not isinstance(metric, ClassMetric):
        return worth.points_per_nat(right, answered, class_count(answers))
    of_counts = metric.of_counts
    return worth.points_per_nat(
        right, answered, class_count(answers), lambda counts: of_counts(counts)[task.main_metric]
    )
