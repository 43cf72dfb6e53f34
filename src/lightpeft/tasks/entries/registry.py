"""All tasks by name, and which one a run means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightpeft.config import DataConfig, TaskEntry, TaskKind
from lightpeft.errors import LightPeftError, nearest, require
from lightpeft.tasks.entries import choice_qa, glue, superglue, text_qa
from lightpeft.tasks.entries.converting import Convert, template_columns
from lightpeft.tasks.kinds.base import is_template
from lightpeft.tasks.kinds.choice import TASKS
from lightpeft.tasks.metrics import METRICS

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
    """The entry that `data.task` names: a kind with the columns of `config`, one of `own`, or one that ships.

    Raises:
        LightPeftError: there is no such task, one of `own` is not well declared, or columns are given for a task that
            has its own.
    """
    own = own or {}
    name = config.task
    for kind in TASKS:
        if name == kind:
            return TaskEntry(kind=kind, test="test", columns=_columns(kind, config))
    for taken in own:
        free = taken not in TASKS and taken not in ENTRIES
        require(free, f"tasks.{taken}: there is a task of that name already; choose another one")
    known = {**ENTRIES, **own}
    if name not in known:
        meant = nearest(name, [*TASKS, *known])
        hint = f'; did you mean "{meant}"?' if meant else ""
        raise LightPeftError(f'data.task is "{name}", which is neither a kind ({", ".join(TASKS)}) nor a task{hint}')
    _check_no_columns(config)
    entry = replace(known[name], name=name)
    check_entry(entry)
    return entry


def converter(entry: TaskEntry) -> Convert | None:
    """The function that an entry names; None: it has columns."""
    return None if entry.convert is None else CONVERTERS[entry.convert]


def check_entry(entry: TaskEntry) -> None:
    """Raise `LightPeftError` unless an entry says all that its kind needs, in names that exist."""
    where, kind = f"tasks.{entry.name}", TASKS[entry.kind]
    columns = (*kind.columns, *kind.optional)
    for metric in entry.metrics:
        _check_known(metric, METRICS, f"{where}.metrics")
    if entry.convert is not None:
        _check_known(entry.convert, CONVERTERS, f"{where}.convert")
    for column, source in entry.columns.items():
        _check_known(column, columns, f"{where}.columns")
        if is_template(source):
            template_columns(source)
    missing = [column for column in kind.columns if entry.columns and column not in entry.columns]
    require(not missing, f"{where}.columns lacks {', '.join(missing)}; rows of kind {entry.kind} need them")
    for column in template_columns(entry.prompt or ""):
        _check_known(column, tuple(entry.columns) or columns, f"{where}.prompt")


def _check_known(name: str, known: Mapping[str, object] | tuple[str, ...], where: str) -> None:
    if name in known:
        return
    meant = nearest(name, known)
    hint = f"did you mean {meant}?" if meant else f"choose of {', '.join(known)}"
    raise LightPeftError(f'{where} has "{name}", which does not exist; {hint}')


def _columns(kind: TaskKind, config: DataConfig) -> dict[str, str]:
    """Columns of a kind as the settings name them."""
    pair = {"text_pair": config.text_pair} if config.text_pair is not None else {}
    prompted = config.prompt is not None and config.completion is not None
    named: dict[TaskKind, dict[str, str]] = {
        "classification": {"text": config.text, **pair, "label": config.label},
        "regression": {"text": config.text, **pair, "label": config.label},
        "multiple-choice": {"context": config.text, "options": config.options, "answer": config.label},
        "span": {"question": config.question, "context": config.context, "answers": config.answers},
        "generation": {"question": config.question, "answers": config.answers},
        "chat": {"messages": config.messages},
        "causal-lm": {"prompt": str(config.prompt), "completion": str(config.completion)}
        if prompted
        else {"text": config.text},
    }
    return named[kind]


def _check_no_columns(config: DataConfig) -> None:
    plain = DataConfig()
    columns = ("text", "text_pair", "label", "options", "prompt", "completion")
    for name in (*columns, "question", "context", "answers", "messages"):
        given = getattr(config, name) != getattr(plain, name)
        require(not given, f"data.{name} is for kinds; task {config.task} has its own columns")
