"""Convert rows of the data to rows in the columns of a kind, by the entry of the task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from string import Formatter
from typing import Any

from datasets import Dataset, Features

from lightpeft.app.tasks.kinds.task_kinds import TASK_KINDS
from lightpeft.app.tasks.rows.columns import is_template, place
from lightpeft.config import TaskEntry
from lightpeft.errors import LightPeftError, nearest, require

Convert = Callable[[Mapping[str, Any]], dict[str, Any]]
"""A row of the data -> a row in the columns of a kind. Pure; reads columns by `row["name"]`, and those that rows to
predict on may lack by `row.get("name")`."""
MISSING_VALUE = "the value is missing; fill it in or drop the row"


def convert_rows(rows: Dataset, entry: TaskEntry, what: str, convert: Convert | None, answered: bool = True) -> Dataset:
    """Return the rows in the columns of the entry's kind; columns that the task does not read are dropped.

    Args:
        entry: the entry of the task, with the columns to read.
        what: names the rows in error messages.
        convert: the function that the entry names; None: the entry has columns.
        answered: False for rows to predict on, which need no answers.

    Raises:
        LightPeftError: a column is missing, or a row does not fit.
    """
    if convert is not None:
        return _from_rows(_convert_each(rows, convert, entry, what))
    sources = _sources(entry, rows, answered)
    for column, source in sources.items():
        for name in source_columns(source):
            if name not in rows.column_names:
                raise LightPeftError(_missing_column(name, rows.column_names, _reader_name(entry, column, name), what))
    if any(is_template(source) for source in sources.values()):
        return _from_rows(_convert_each(rows, _make_filler(sources), entry, what))
    features = Features({column: rows.features[source] for column, source in sources.items()})
    return Dataset.from_dict({column: rows[source][:] for column, source in sources.items()}, features=features)


def source_columns(source: str) -> list[str]:
    """Return the columns of the data that `source`, a column or a template, reads."""
    return template_columns(source) if is_template(source) else [source]


def template_columns(template: str) -> list[str]:
    """Return the names of the columns that a template reads.

    Raises:
        LightPeftError: the template is malformed, or its braces hold more than a name: a width could fill the memory.
    """
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise LightPeftError(
            f'template "{template}" is malformed ({error}); write "{{{{" for a literal brace'
        ) from error
    plain = all(name and not spec and not conversion and "__" not in name for _, name, spec, conversion in parts)
    require(plain, f'template "{template}" is malformed; write only the name of a column in braces')
    fields = [str(name) for _, name, _, _ in parts]
    return [name.partition(".")[0].partition("[")[0] for name in fields]


def _missing_column(column: str, columns: Iterable[str], reader: str, what: str) -> str:
    names = [name for name in columns if name]
    meant = nearest(column, names)
    hint = f'; did you mean "{meant}"?' if meant else ""
    return f"{reader}, but {what} has only the columns {', '.join(names)}{hint}"


def _sources(entry: TaskEntry, rows: Dataset, answered: bool) -> dict[str, str]:
    """Return column of the kind -> its source (column or template), for the columns to read."""
    kind = TASK_KINDS[entry.kind]
    if entry.columns:
        sources = kind.sources(entry.columns)
    else:
        there = [column for column in kind.optional if column in rows.column_names]
        sources = {column: column for column in (*kind.columns, *there)}
    if answered:
        return sources
    return {column: source for column, source in sources.items() if column not in kind.targets}


def _reader_name(entry: TaskEntry, column: str, source: str) -> str:
    """Return the beginning of an error message: the setting or task that reads the column."""
    if entry.name:
        return f'task {entry.name} reads "{source}"'
    if column in entry.columns:
        return f'data.columns.{column} is "{entry.columns[column]}"'
    return f'data.task {entry.kind} reads "{source}"'


class _Row(dict[str, Any]):
    """A row of the data that remembers the last column read, so that errors can name it."""

    def __init__(self, values: dict[str, Any], entry: TaskEntry, what: str, number: int) -> None:
        super().__init__(values)
        self.entry, self.what, self.number, self.read = entry, what, number, ""

    def __getitem__(self, column: str) -> Any:
        self.read = column
        if column not in self:
            raise LightPeftError(_missing_column(column, self, _reader_name(self.entry, column, column), self.what))
        value = super().__getitem__(column)
        require(value is not None, f"{place(self.what, self.number, column)}: {MISSING_VALUE}")
        return value

    def get(self, column: str, default: Any = None) -> Any:
        self.read = column
        return super().get(column, default)


def _convert_each(rows: Dataset, convert: Convert, entry: TaskEntry, what: str) -> Iterator[dict[str, Any]]:
    """Yield converted rows; the error about a row that cannot be converted names the last column read."""
    for number, values in enumerate(rows.to_list(), 1):
        row = _Row(values, entry, what, number)
        try:
            yield convert(row)
        except LightPeftError:
            raise
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            where, reason = place(what, number, row.read), f"{type(error).__name__}: {error}"
            raise LightPeftError(
                f"{where}: the row does not have the format of the task ({reason}); correct or drop the row"
            ) from error


def _make_filler(sources: Mapping[str, str]) -> Convert:
    """Return the converter that fills templates and copies columns."""

    def fill(row: Mapping[str, Any]) -> dict[str, Any]:
        return {
            column: source.format_map(row) if is_template(source) else row.get(source)
            for column, source in sources.items()
        }

    return fill


def _from_rows(rows: Iterable[dict[str, Any]]) -> Dataset:
    made = list(rows)
    return Dataset.from_dict({column: [row.get(column) for row in made] for column in made[0]})
