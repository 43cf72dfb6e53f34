"""Test rows that a model, or its teacher, has seen in training."""

from __future__ import annotations

from datasets import Dataset

from lightpeft.app.folders.forms import Found
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.loading import load_task
from lightpeft.errors import LightPeftError

NOTABLE = 0.05
"""Least fraction of test rows among the training rows for a warning; most data sets have a few duplicates."""


def rows_seen_by(found: Found, task: Task, whose: str = "training rows") -> str | None:
    """Return a warning if the run that made a model has trained on many test rows of a task; see `seen_rows`.

    None: few or none, or the model is no run, or the rows of that run are not there any more.
    """
    if found.run is None:
        return None
    try:
        training = load_task(found.run.data, found.config, found.run.tasks).train
    except LightPeftError:
        return None
    return seen_rows(task, training, whose)


def seen_rows(task: Task, training: Dataset, whose: str = "training rows") -> str | None:
    """Return a warning if many test rows of a task are also training rows; None: few or none are.

    Rows are compared by their inputs, whatever their labels are.

    Args:
        task: the task, with its test rows.
        training: rows that a model was trained on.
        whose: names `training` in the warning.
    """
    columns = [name for name in task.test.column_names if name in {*task.columns, *task.optional} - {*task.targets}]
    if not columns or not set(columns) <= set(training.column_names):
        return None

    def keys(rows: Dataset) -> list[str]:
        table = rows.select_columns(columns)[:]
        return [repr(row) for row in zip(*(table[name] for name in columns), strict=True)]

    known = set(keys(training))
    seen = sum(key in known for key in keys(task.test))
    if not seen or seen < NOTABLE * len(task.test):
        return None
    return f"{seen:,} of the {len(task.test):,} test rows are also {whose}, so the scores are too high"
