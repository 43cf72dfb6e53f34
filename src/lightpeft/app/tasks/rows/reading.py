"""Read rows from one local file or one hub data set into a `datasets.Dataset` in memory."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow  # type: ignore[import-untyped,unused-ignore]
import pyarrow.parquet  # type: ignore[import-untyped,unused-ignore]
from datasets import Dataset

from lightpeft.config.places import HUB_NAME, check_file, is_local, local_path
from lightpeft.errors import LightPeftError, one_line, require
from lightpeft.files.foreign import parsing
from lightpeft.models import hub

LONGEST_FIELD = 2**30
"""Most characters of a CSV field; the csv module's default (131,072) is less than a long document."""


def read_rows(source: str, what: str) -> Dataset:
    """Read a local file (by suffix) or a hub data set, all of it, into memory; nothing is written beside the file.

    Args:
        source: a path ending in one of `READERS`' suffixes, or a hub name as `[owner/]name[/config][:split]`
            (`/config` needs the owner; the split defaults to train, or to test where `what` is "data.test").
        what: the setting that names the source, for error messages ("data.train").

    Returns:
        At least one row. CSV and TSV values are strings; the other formats keep their types.

    Raises:
        LightPeftError: the source is missing, empty, malformed or of unknown type, or the hub cannot be reached.
    """
    require(source, f"{what} is not set; give a {_suffixes()} file or the name of a hub data set")
    path = local_path(source)
    return read_file(path, what) if is_local(source) else read_hub(source, what)


def read_file(path: Path, what: str) -> Dataset:
    """Read a local file by its suffix, into memory; errors name the setting `what`."""
    check_file(path, what)
    kind = "a folder" if path.is_dir() else "not a regular file"
    require(path.is_file(), f"{what}: {path} is {kind}; give one {_suffixes()} file")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise LightPeftError(f'{what}: {path} has the suffix "{path.suffix}"; give a {_suffixes()} file')
    require(path.stat().st_size > 0, f"{what}: {path} is empty")
    try:
        rows = reader(path)
    except UnicodeDecodeError as error:
        raise LightPeftError(f"{what}: {path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise LightPeftError(f"{what}: {path} cannot be read: {error.strerror or one_line(error)}") from error
    except (_MalformedError, LightPeftError) as error:
        raise LightPeftError(f"{what}: {error}") from error
    require(rows.num_rows > 0, f"{what}: {path} has no rows")
    return rows


def with_suffix(path: Path) -> Path | None:
    """Return the existing file that is `path` plus a known suffix; None if there is none."""
    return next((file for suffix in READERS if (file := path.with_name(path.name + suffix)).is_file()), None)


class HubNotReachedError(LightPeftError):
    """The hub cannot be reached: there is no network, or it is down."""


class _MalformedError(Exception):
    """The content does not match the suffix; the message names file and line."""


def _read_csv(path: Path) -> Dataset:
    return _parse_delimited(path, ",", csv.QUOTE_MINIMAL)


def _read_tsv(path: Path) -> Dataset:
    try:
        return _parse_delimited(path, "\t", csv.QUOTE_MINIMAL)
    except _MalformedError:
        # corpora are often tab separated without any quoting, so that a stray quote character is just text
        return _parse_delimited(path, "\t", csv.QUOTE_NONE)


def _parse_delimited(path: Path, delimiter: str, quoting: Any) -> Dataset:
    csv.field_size_limit(LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            header = next(reader, [])
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise _MalformedError(
                    f'{path} line 1 names column "{twice[0]}" twice; the first line holds the column names'
                )
            rows = []
            for row in reader:
                if row and len(row) != len(header):
                    raise _MalformedError(
                        f"{path} line {reader.line_num} has {len(row)} fields, its header {len(header)}"
                    )
                rows.append(row)
        except csv.Error as error:
            raise _MalformedError(f"{path} line {reader.line_num}: {error}") from error
    rows = [row for row in rows if row]
    return _from_columns({name: [row[i] for row in rows] for i, name in enumerate(header)}, path)


def read_json_text(text: str, what: str) -> Dataset:
    """Parse a JSON list of objects, or JSON lines with one object each; `what` names the text in errors.

    Raises:
        LightPeftError: malformed or empty.
    """
    try:
        rows = _parse_json_rows(text, what)
    except _MalformedError as error:
        raise LightPeftError(str(error)) from error
    require(rows.num_rows > 0, f"{what} has no rows")
    return rows


def _read_json(path: Path) -> Dataset:
    return _parse_json_rows(path.read_text(encoding="utf-8-sig"), path)


def _parse_json_rows(text: str, path: Path | str) -> Dataset:
    """Parse a list of objects or one object per line, whichever the text holds."""
    if text.lstrip().startswith("["):
        placed = [(f"entry {number}", row) for number, row in enumerate(_parse_json(text, path, 1), 1)]
    else:
        lines = enumerate(text.split("\n"), 1)
        placed = [(f"line {number}", _parse_json(line, path, number)) for number, line in lines if line.strip()]
    for where, row in placed:
        if not isinstance(row, dict):
            raise _MalformedError(
                f"{path} {where} is not a JSON object; write a list of objects or one object per line"
            )
    names = dict.fromkeys(name for _, row in placed for name in row)
    return _from_columns({name: [row.get(name) for _, row in placed] for name in names}, path)


def _parse_json(text: str, path: Path | str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise _MalformedError(
            f"{path} line {line} is not JSON (list of objects, or one object per line): {error.msg}"
        ) from error
    except (ValueError, RecursionError) as error:  # too many digits, or brackets
        raise _MalformedError(f"{path} line {first_line} cannot be read: {one_line(error)}") from error


def _read_parquet(path: Path) -> Dataset:
    with parsing(f"{path} is not a readable Parquet file"):
        return Dataset(pyarrow.parquet.read_table(path))


def _from_columns(columns: dict[str, list[Any]], path: Path | str) -> Dataset:
    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError) as error:
            raise _MalformedError(f'{path}: column "{name}" mixes types: {one_line(error)}') from error
    try:
        return Dataset(pyarrow.table(arrays))
    except (pyarrow.ArrowException, UnicodeEncodeError, RecursionError) as error:
        raise _MalformedError(f"{path} cannot be read: {one_line(error)}") from error


READERS: dict[str, Callable[[Path], Dataset]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}
"""File suffix -> reader."""


def read_hub(source: str, what: str) -> Dataset:
    """Load a split of a hub data set into memory; `source` is owner/name[/config][:split].

    Raises:
        HubNotReachedError: the hub cannot be reached.
        LightPeftError: the data set cannot be loaded, or has no rows.
    """
    match = HUB_NAME.fullmatch(source)
    require(match, f'{what}: "{source}" is neither a file nor a hub name; hub names are owner/name[/config][:split]')
    assert match is not None
    split = match["split"] or ("test" if what == "data.test" else "train")
    hub.go_offline_if_unreachable(source)
    try:
        with _hide_progress_bars():
            rows = datasets.load_dataset(match["name"], match["config"], split=split)
    except ConnectionError as error:
        raise HubNotReachedError(
            f'{what}: file "{source}" does not exist, and the hub cannot be reached for a data set of that name; '
            f"give a local {_suffixes()} file instead"
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise LightPeftError(f'{what}: hub data set "{source}" cannot be loaded: {one_line(error)}') from error
    require(rows.num_rows > 0, f"{what}: hub data set {source} has no rows")
    return rows


@contextmanager
def _hide_progress_bars() -> Iterator[None]:
    """Hide the progress bars of `datasets` inside the block."""
    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            datasets.enable_progress_bars()


def _suffixes() -> str:
    *first, last = READERS
    return f"{', '.join(first)} or {last}"
