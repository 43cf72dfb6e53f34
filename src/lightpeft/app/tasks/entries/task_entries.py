"""All built-in tasks by name, and the lookup of a run's task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightpeft.app.tasks.entries import choice_qa, glue, superglue, text_qa
from lightpeft.app.tasks.entries.converting import Convert, template_columns
from lightpeft.app.tasks.kinds.task_kinds import TASK_KINDS
from lightpeft.app.tasks.metrics import METRICS
from lightpeft.app.tasks.rows.columns import is_template
from lightpeft.config import DataConfig, TaskEntry
from lightpeft.errors import LightPeftError, nearest, require

_MODULES = (glue, superglue, choice_qa, text_qa)
ENTRIES: dict[str, TaskEntry] = {
    name: replace(entry, name=name) for module in _MODULES for name, entry in module.ENTRIES.items()
}
"""Name of a task -> its entry."""
CONVERTERS: dict[str, Convert] = {
    name: convert for module in _MODULES for name, convert in getattr(module, "CONVERTERS", {}).items()
}
"""Name in `TaskEntry.convert` -> the function."""


def find_entry(config: DataConfig, own: Mapping[str, TaskEntry] | None = None) -> TaskEntry:
    """Return the entry that `data.task` names: a kind with the columns of `config`, one of `own`, or a built-in task.

    Raises:
        LightPeftError: the task does not exist, an entry of `own` is invalid, or columns are given for a task that
            has its own.
    """
    own = own or {}
    name = config.task
    _check_own(own)
    if name in TASK_KINDS:
        _check_columns(name, config.columns, "data")
        return TaskEntry(kind=name, test="test", columns=TASK_KINDS[name].sources(config.columns))
    known = {**ENTRIES, **own}
    if name not in known:
        meant = nearest(name, [*TASK_KINDS, *known])
        hint = f'; did you mean "{meant}"?' if meant else ""
        raise LightPeftError(
            f'data.task "{name}" is neither a kind ({", ".join(TASK_KINDS)}) nor the name of a task{hint}'
        )
    require(not config.columns, f"data.columns is only for kinds, and task {name} has its own columns; leave it out")
    entry = replace(known[name], name=name)
    check_entry(entry)
    return entry


def _check_own(own: Mapping[str, TaskEntry]) -> None:
    """Raise `LightPeftError` if a user's task has the name of a built-in task or an unknown kind."""
    for name, entry in own.items():
        free = name not in TASK_KINDS and name not in ENTRIES
        require(free, f"tasks.{name}: the name belongs to a built-in task or kind; choose another one")
        _check_known(entry.kind, TASK_KINDS, f"tasks.{name}.kind")


def converter(entry: TaskEntry) -> Convert | None:
    """Return the function that an entry names; None if the entry has columns."""
    return None if entry.convert is None else CONVERTERS[entry.convert]


def check_entry(entry: TaskEntry) -> None:
    """Raise `LightPeftError` unless all names in an entry exist: kind, metrics, converter, columns."""
    where = f"tasks.{entry.name}"
    _check_known(entry.kind, TASK_KINDS, f"{where}.kind")
    kind = TASK_KINDS[entry.kind]
    for metric in entry.metrics:
        _check_known(metric, METRICS, f"{where}.metrics")
    if entry.convert is not None:
        _check_known(entry.convert, CONVERTERS, f"{where}.convert")
    _check_columns(entry.kind, entry.columns, where)
    columns = tuple(kind.sources(entry.columns)) if entry.columns else (*kind.columns, *kind.optional)
    asked = tuple(column for column in columns if column not in kind.targets)
    for column in template_columns(entry.prompt or ""):
        _check_known(column, asked, f"{where}.prompt")


def _check_columns(kind: str, named: Mapping[str, str], where: str) -> None:
    """Raise `LightPeftError` unless the kind has the named columns and their templates are well-formed."""
    columns = (*TASK_KINDS[kind].columns, *TASK_KINDS[kind].optional)
    for column, source in named.items():
        there = f"rows of kind {kind} have {', '.join(columns)}"
        require(column in columns, f'{where}.columns: column "{column}" does not exist; {there}')
        if is_template(source):
            template_columns(source)


def _check_known(name: str, known: Mapping[str, object] | tuple[str, ...], where: str) -> None:
    if name in known:
        return
    meant = nearest(name, known)
    hint = f"did you mean {meant}?" if meant else f"choose one of {', '.join(known)}"
    raise LightPeftError(f'{where}: "{name}" does not exist; {hint}')
