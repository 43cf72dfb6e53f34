"""Convert a rise of a task's loss, in nats, to points of its main metric, for tasks with classes."""

from __future__ import annotations

import numpy as np

from lightpeft.app.tasks.answers import Answers, ClassMetric, class_count
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.metrics import METRICS, accuracy
from lightpeft.budget import worth
from lightpeft.models.task_heads import CLASSIFICATION, MULTIPLE_CHOICE


def answers_are_classes(task: Task) -> bool:
    """Return True if a head chooses one of several answers and the main metric counts classes (accuracy, F1, ...)."""
    metric = METRICS[task.metrics[0]].compute
    return task.head in (CLASSIFICATION, MULTIPLE_CHOICE) and (metric is accuracy or isinstance(metric, ClassMetric))


def points_per_nat(answers: Answers, task: Task) -> float:
    """Return the drop of the main metric, in points (hundredths) per nat, when the loss rises a little.

    Args:
        answers: answers of the model to labeled rows.
        task: a task for which `answers_are_classes` is True.
    """
    right, answered = np.asarray(answers.references, int), np.asarray(answers.predictions, int)
    metric = METRICS[task.metrics[0]].compute
    if not isinstance(metric, ClassMetric):
        return worth.points_per_nat(right, answered, class_count(answers))
    of_counts = metric.of_counts
    return worth.points_per_nat(
        right, answered, class_count(answers), lambda counts: of_counts(counts)[task.main_metric]
    )
