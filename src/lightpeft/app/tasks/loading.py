"""Load the task of a run with its rows, store its facts in an adapter, and restore the task from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from datasets import Dataset
from transformers import PretrainedConfig

from lightpeft.app.tasks.entries.converting import convert_rows, source_columns
from lightpeft.app.tasks.entries.task_entries import ENTRIES, check_entry, converter, find_entry
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.kinds.likelihood import LikelihoodTask
from lightpeft.app.tasks.kinds.task_kinds import TASK_KINDS, task_class
from lightpeft.app.tasks.rows.sources import Split, hub_rows, read_splits
from lightpeft.app.tasks.rows.splitting import limit_rows, split_rows
from lightpeft.config import DataConfig, TaskEntry
from lightpeft.config.validation import from_dict, short_repr
from lightpeft.errors import require

READING = ("max_length", "null_threshold", "answer_tokens")
"""Settings of `data` that an adapter stores: they change how rows are encoded and answered."""


def load_task(
    config: DataConfig,
    model: PretrainedConfig | None = None,
    own: Mapping[str, TaskEntry] | None = None,
    *,
    train: bool = True,
) -> Task:
    """Read, convert, check and split the rows that `config` names, and return the task with them.

    Args:
        model: configuration of the foundation model, which decides how it answers; None: one that has every head.
        own: tasks of the user by name.
        train: False to load only test rows. `Task.train` is then empty, and the labels are those of the test rows,
            unless the test rows have to be held out of training rows.

    Raises:
        LightPeftError: a source cannot be read, its rows don't fit the task, or the model cannot answer it.
    """
    entry = find_entry(config, own)
    kind = task_class(entry.kind, config.answer, model)
    splits = read_splits(entry, config, train)
    rows = _convert_and_check(splits.train, entry, kind) if splits.train is not None else None
    test = _convert_and_check(splits.test, entry, kind) if splits.test is not None else None
    more = {
        prefix: limit_rows(_convert_and_check(split, entry, kind), config.limit_test)
        for prefix, split in splits.more_tests.items()
    }
    if rows is None:
        assert test is not None
        test = limit_rows(test, config.limit_test)
        return kind(config, test.select([]), test, kind.label_set(test, entry), entry, more)
    labels = kind.label_set(rows, entry)
    rows, test = split_rows(rows, test, config)
    for each in (test, *more.values()):
        kind.check_split(rows, each, labels, entry)
    return kind(config, rows, test, labels, entry, more)


def _convert_and_check(split: Split, entry: TaskEntry, kind: type[Task]) -> Dataset:
    """Return the rows in the columns of the kind, after its checks."""
    rows = convert(split.rows, entry, split.what)
    kind.check(rows, entry, split.what)
    return rows


def convert(rows: Dataset, entry: TaskEntry, what: str, answered: bool = True) -> Dataset:
    """Return the rows in the columns of the entry's kind.

    Args:
        what: names the rows in error messages.
        answered: False for rows to predict on, which need no answers.

    Raises:
        LightPeftError: a column is missing, or a row does not fit.
    """
    return convert_rows(rows, entry, what, converter(entry), answered)


def input_columns(task: Task) -> list[str]:
    """Return the columns that rows to predict on need; empty if a function (`entry.convert`) reads the row."""
    entry, kind = task.entry, TASK_KINDS[task.entry.kind]
    if entry.convert is not None:
        return []
    sources = kind.sources(entry.columns) if entry.columns else {column: column for column in kind.columns}
    needed = [source for column, source in sources.items() if column not in kind.targets]
    return list(dict.fromkeys(name for source in needed for name in source_columns(source)))


def task_facts(task: Task) -> dict[str, Any]:
    """Return the task as plain data, as an adapter stores it: predicting and evaluating need nothing else."""
    return {
        "entry": asdict(task.entry),
        "answer": "likelihood" if isinstance(task, LikelihoodTask) else "head",
        "likelihood": task.config.likelihood,
        "labels": task.labels,
        "rows": hub_rows(task.entry, task.config),
        **{name: getattr(task.config, name) for name in READING},
    }


def run_settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings of a `RunConfig` that name the task in `facts`; empty if there are no facts.

    Args:
        facts: the result of `task_facts`; where the rows were is left out.
    """
    if not facts:
        return {}
    entry = _checked_entry(facts)
    said = {name: facts[name] for name in ("answer", "likelihood", *READING) if name in facts}
    if not entry.name:
        return {"data": {"task": entry.kind, "columns": entry.columns, **said}}
    own = {} if entry.name in ENTRIES else {entry.name: {**facts["entry"], "name": ""}}
    return {"data": {"task": entry.name, **said}, "tasks": own}


def restore_task(facts: Mapping[str, Any]) -> Task:
    """Return the task that `task_facts` described, without rows.

    Raises:
        LightPeftError: the facts are incomplete or invalid.
    """
    entry = _checked_entry(facts)
    config = DataConfig(
        task=entry.name or entry.kind,
        answer=facts["answer"],
        likelihood=facts["likelihood"],
        **{name: facts[name] for name in READING if name in facts},
    )
    labels = facts["labels"]
    named = isinstance(labels, list) and all(isinstance(each, str) for each in labels)
    require(named, f"task.labels is {short_repr(labels)}; it must be a list of names")
    none = Dataset.from_dict({})
    return task_class(entry.kind, config.answer, None)(config, none, none, labels, entry)


def _checked_entry(facts: Mapping[str, Any]) -> TaskEntry:
    """Return the entry in `facts`, checked."""
    entry = from_dict(TaskEntry, facts["entry"], "task.entry.")
    check_entry(entry)
    return entry
