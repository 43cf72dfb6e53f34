"""From the data's own rows to rows in the columns of a kind, as a task's entry says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from string import Formatter
from typing import Any

from datasets import Dataset, Features

from lightpeft.app.tasks.kinds.registry import TASK_KINDS
from lightpeft.app.tasks.rows.columns import is_template, place
from lightpeft.config import TaskEntry
from lightpeft.errors import LightPeftError, nearest, require

Convert = Callable[[Mapping[str, Any]], dict[str, Any]]
"""A row of the data -> a row in the columns of a kind. Pure; reads columns by `row["name"]`, and those that rows to
predict on may lack by `row.get("name")`."""
NOT_THERE = "there is no value; fill it in or drop the row"


def convert_rows(rows: Dataset, entry: TaskEntry, what: str, convert: Convert | None, answered: bool = True) -> Dataset:
    """The rows in the columns of the entry's kind; columns of the data that the task does not read are dropped.

    Args:
        entry: says which columns are read.
        what: names the rows in error lines.
        convert: the function that the entry names; None: it has columns.
        answered: off for rows to predict on, which need no answers.

    Raises:
        LightPeftError: a column is missing, or a row does not fit.
    """
    if convert is not None:
        return _from_rows(_convert_each(rows, convert, entry, what))
    sources = _sources(entry, rows, answered)
    for column, source in sources.items():
        for name in source_columns(source):
            if name not in rows.column_names:
                raise LightPeftError(_missing(name, rows.column_names, _reader(entry, column, name), what))
    if any(is_template(source) for source in sources.values()):
        return _from_rows(_convert_each(rows, _filler(sources), entry, what))
    features = Features({column: rows.features[source] for column, source in sources.items()})
    return Dataset.from_dict({column: rows[source][:] for column, source in sources.items()}, features=features)


def source_columns(source: str) -> list[str]:
    """Columns of the data that a column or a template reads."""
    return template_columns(source) if is_template(source) else [source]


def template_columns(template: str) -> list[str]:
    """Names of the columns that a template reads.

    Raises:
        LightPeftError: it is no template, or has more than names of columns in it: a width could fill the memory.
    """
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise LightPeftError(f'"{template}" is no template ({error}); write "{{{{" for a brace') from error
    plain = all(name and not spec and not conversion and "__" not in name for _, name, spec, conversion in parts)
    require(plain, f'"{template}" is no template: braces hold the name of a column and nothing else')
    fields = [str(name) for _, name, _, _ in parts]
    return [name.partition(".")[0].partition("[")[0] for name in fields]


def _missing(column: str, columns: Iterable[str], reader: str, what: str) -> str:
    names = [name for name in columns if name]
    meant = nearest(column, names)
    hint = f'; did you mean "{meant}"?' if meant else ""
    return f"{reader}, but {what} has only the columns {', '.join(names)}{hint}"


def _sources(entry: TaskEntry, rows: Dataset, answered: bool) -> dict[str, str]:
    """Column of the kind -> where it comes from, for the columns that are to be read."""
    kind = TASK_KINDS[entry.kind]
    if entry.columns:
        sources = kind.sources(entry.columns)
    else:
        there = [column for column in kind.optional if column in rows.column_names]
        sources = {column: column for column in (*kind.columns, *there)}
    if answered:
        return sources
    return {column: source for column, source in sources.items() if column not in kind.targets}


def _reader(entry: TaskEntry, column: str, source: str) -> str:
    """What reads a column of the data, as the user knows it."""
    if entry.name:
        return f'task {entry.name} reads "{source}"'
    if column in entry.columns:
        return f'data.columns.{column} is "{entry.columns[column]}"'
    return f'data.task {entry.kind} reads "{source}"'


class _Row(dict[str, Any]):
    """A row of the data that knows which column was read last, so that errors can name it."""

    def __init__(self, values: dict[str, Any], entry: TaskEntry, what: str, number: int) -> None:
        super().__init__(values)
        self.entry, self.what, self.number, self.read = entry, what, number, ""

    def __getitem__(self, column: str) -> Any:
        self.read = column
        if column not in self:
            raise LightPeftError(_missing(column, self, _reader(self.entry, column, column), self.what))
        value = super().__getitem__(column)
        require(value is not None, f"{place(self.what, self.number, column)}: {NOT_THERE}")
        return value

    def get(self, column: str, default: Any = None) -> Any:
        self.read = column
        return super().get(column, default)


def _convert_each(rows: Dataset, convert: Convert, entry: TaskEntry, what: str) -> Iterator[dict[str, Any]]:
    """Converted rows; one that cannot be converted is an error that names the column read last."""
    for number, values in enumerate(rows.to_list(), 1):
        row = _Row(values, entry, what, number)
        try:
            yield convert(row)
        except LightPeftError:
            raise
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            where, reason = place(what, number, row.read), f"{type(error).__name__}: {error}"
            raise LightPeftError(f"{where}: the row does not have the task's form ({reason})") from error


def _filler(sources: Mapping[str, str]) -> Convert:
    """The conversion that fills templates and copies columns."""

    def fill(row: Mapping[str, Any]) -> dict[str, Any]:
        return {
            column: source.format_map(row) if is_template(source) else row.get(source)
            for column, source in sources.items()
        }

    return fill


def _from_rows(rows: Iterable[dict[str, Any]]) -> Dataset:
    made = list(rows)
    return Dataset.from_dict({column: [row.get(column) for row in made] for column in made[0]})
