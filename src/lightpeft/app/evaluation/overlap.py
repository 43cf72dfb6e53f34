"""Test rows that a model has seen in training."""

from __future__ import annotations

from datasets import Dataset

from lightpeft.app.tasks.kinds.base import Task

NOTABLE = 0.05
"""Least fraction of test rows among the training rows for a warning; most data sets have a few duplicates."""


def seen_rows(task: Task, training: Dataset) -> str | None:
    """Return a warning if many test rows of a task are also training rows; None: few or none are.

    Rows are compared by their inputs, whatever their labels are.

    Args:
        task: the task, with its test rows.
        training: rows that a model was trained on.
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
    return f"{seen:,} of the {len(task.test):,} test rows are also training rows, so the scores are too high"
