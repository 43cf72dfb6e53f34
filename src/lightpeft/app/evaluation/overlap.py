"""Test rows that a model has seen in training."""

from __future__ import annotations

import json

from datasets import Dataset

from lightpeft.app.tasks.kinds.base import Task

NOTABLE = 0.05
"""Part of the test rows from which on a shared row is no accident; data sets with a few duplicates stay below."""


def seen_rows(task: Task, training: Dataset) -> str | None:
    """Return a warning if many test rows of a task occur in training rows, with any reference; None: few or none do.

    Args:
        task: the task, with its test rows.
        training: rows that a model was trained on.
    """
    columns = [name for name in task.test.column_names if name in {*task.columns, *task.optional} - {*task.targets}]
    if not columns or not set(columns) <= set(training.column_names):
        return None

    def keys(rows: Dataset) -> list[str]:
        return [json.dumps(row, sort_keys=True, default=str) for row in rows.select_columns(columns)]

    known = set(keys(training))
    seen = sum(key in known for key in keys(task.test))
    if seen < NOTABLE * len(task.test) or not seen:
        return None
    return f"{seen:,} of the {len(task.test):,} test rows are training rows, too, which makes scores too good"
