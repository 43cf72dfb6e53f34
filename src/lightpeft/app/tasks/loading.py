"""From settings to a task with its rows, and from what an adapter says of its task back to the task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from datasets import Dataset
from transformers import PretrainedConfig

from lightpeft.app.tasks.entries.converting import convert_rows, source_columns
from lightpeft.app.tasks.entries.registry import ENTRIES, check_entry, converter, find_entry
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.kinds.likelihood import LikelihoodTask
from lightpeft.app.tasks.kinds.registry import TASK_KINDS, task_class
from lightpeft.app.tasks.rows.sources import Split, read_splits
from lightpeft.app.tasks.rows.splitting import limited, split_rows
from lightpeft.config import DataConfig, TaskEntry
from lightpeft.config.validation import from_dict

READING = ("max_length", "null_threshold", "answer_tokens")
"""Settings of `data` that decide how rows are read and answered."""


def load_task(
    config: DataConfig,
    model: PretrainedConfig | None = None,
    own: Mapping[str, TaskEntry] | None = None,
    *,
    train: bool = True,
) -> Task:
    """Read, convert, check and split the rows that `config` names.

    Args:
        model: configuration of the foundation model, which decides how it answers; None: one that has every head.
        own: tasks of the user by name.
        train: off: only rows to evaluate on are wanted. `train` is empty, and labels are those of these rows, unless
            they have to be held out of training rows.

    Raises:
        LightPeftError: a source cannot be read, its rows don't fit the task, or the model cannot answer it.
    """
    entry = find_entry(config, own)
    kind = task_class(entry.kind, config.answer, model)
    splits = read_splits(entry, config, train)
    rows = _ready(splits.train, entry, kind) if splits.train is not None else None
    test = _ready(splits.test, entry, kind) if splits.test is not None else None
    more = {
        prefix: limited(_ready(split, entry, kind), config.limit_test) for prefix, split in splits.more_tests.items()
    }
    if rows is None:
        assert test is not None
        test = limited(test, config.limit_test)
        return kind(config, test.select([]), test, kind.label_set(test, entry), entry, more)
    labels = kind.label_set(rows, entry)
    rows, test = split_rows(rows, test, config)
    for each in (test, *more.values()):
        kind.check_split(rows, each, labels, entry)
    return kind(config, rows, test, labels, entry, more)


def _ready(split: Split, entry: TaskEntry, kind: type[Task]) -> Dataset:
    """Rows as they were read, in the columns of the kind and found good."""
    rows = convert(split.rows, entry, split.what)
    kind.check(rows, entry, split.what)
    return rows


def convert(rows: Dataset, entry: TaskEntry, what: str, answered: bool = True) -> Dataset:
    """Rows of the data in the columns of the entry's kind; `answered` off: rows to predict on, without answers.

    Raises:
        LightPeftError: a column is missing, or a row does not fit; `what` names the rows.
    """
    return convert_rows(rows, entry, what, converter(entry), answered)


def input_columns(task: Task) -> list[str]:
    """Columns of the data that a row to predict on needs; none where a function of the entry reads the row."""
    entry, kind = task.entry, TASK_KINDS[task.entry.kind]
    if entry.convert is not None:
        return []
    sources = kind.sources(entry.columns) if entry.columns else {column: column for column in kind.columns}
    needed = [source for column, source in sources.items() if column not in kind.targets]
    return list(dict.fromkeys(name for source in needed for name in source_columns(source)))


def task_facts(task: Task) -> dict[str, Any]:
    """What an adapter says of its task, as plain data, so that predicting and evaluating need nothing else."""
    return {
        "entry": asdict(task.entry),
        "answer": "likelihood" if isinstance(task, LikelihoodTask) else "head",
        "likelihood": task.config.likelihood,
        "labels": task.labels,
        **{name: getattr(task.config, name) for name in READING},
    }


def run_settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a `RunConfig`, nested, that name the task that `task_facts` told of; empty where there are no facts.

    Where its rows are is not among them.
    """
    if not facts:
        return {}
    entry = _entry(facts)
    said = {name: facts[name] for name in ("answer", "likelihood", *READING) if name in facts}
    if not entry.name:
        return {"data": {"task": entry.kind, "columns": entry.columns, **said}}
    own = {} if entry.name in ENTRIES else {entry.name: {**facts["entry"], "name": ""}}
    return {"data": {"task": entry.name, **said}, "tasks": own}


def restore_task(facts: Mapping[str, Any]) -> Task:
    """The task that `task_facts` told of, without rows.

    Raises:
        LightPeftError: these are no such facts.
    """
    entry = _entry(facts)
    config = DataConfig(
        task=entry.name or entry.kind,
        answer=facts["answer"],
        likelihood=facts["likelihood"],
        **{name: facts[name] for name in READING if name in facts},
    )
    none = Dataset.from_dict({})
    return task_class(entry.kind, config.answer, None)(config, none, none, list(facts["labels"]), entry)


def _entry(facts: Mapping[str, Any]) -> TaskEntry:
    """The entry of a task, found good."""
    entry = from_dict(TaskEntry, facts["entry"], "task.entry.")
    check_entry(entry)
    return entry
