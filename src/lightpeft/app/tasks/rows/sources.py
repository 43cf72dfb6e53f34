"""Which rows a task has: files that the run names, a folder in the hub's layout, or the hub's own data set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from lightpeft.app.tasks.rows.reading import (
    READERS,
    HubNotReachedError,
    is_local,
    read_file,
    read_hub,
    read_rows,
    with_suffix,
)
from lightpeft.config import DataConfig, TaskEntry
from lightpeft.errors import LightPeftError, require

DATA_FOLDER = "data"
"""Where a repository of the hub keeps the files of its only configuration."""


@dataclass(frozen=True)
class Split:
    """Rows as they were read."""

    rows: Dataset
    what: str
    """What error lines call them: the setting, and the file if there is one."""


@dataclass(frozen=True)
class Splits:
    """The rows of a task as they were read."""

    train: Split | None
    """None: they were not needed."""
    test: Split | None
    """None: a part of the training rows is to be held out."""
    more_tests: dict[str, Split]
    """By the prefix of their metrics."""


def read_splits(entry: TaskEntry, config: DataConfig, train: bool = True) -> Splits:
    """The task's rows: `data.train` and `data.test`, else the folder `data.path` or the entry's, else the hub.

    Args:
        train: off: rows to train on are read only where those to evaluate on have to be held out of them.

    Raises:
        LightPeftError: a source is missing or cannot be read, or the hub was not reached.
    """
    path = config.path or entry.path
    test = _named(config.test, "data.test") if config.test is not None and (config.train or not train) else None
    if test is not None and not train:
        return Splits(None, test, {})
    if config.train or (train and path is None and entry.hub is None):
        return Splits(_named(config.train, "data.train"), test, {})
    require(config.test is None, "data.test needs data.train: give both, or the folder of a task as data.path")
    require(
        path is not None or entry.hub is not None,
        "there are no rows to evaluate on; give a file as --data.test, or a task that has its own as --data.task",
    )
    return _of_hub(entry, train) if path is None else _of_folder(Path(path).expanduser(), entry, train)


def _named(source: str, setting: str) -> Split:
    """The rows that a setting names."""
    rows = read_rows(source, setting)
    return Split(rows, f"{source}: {setting}" if is_local(source) else setting)


def _of_folder(folder: Path, entry: TaskEntry, train: bool) -> Splits:
    require(folder.is_dir(), f"data.path: folder {folder} does not exist")
    test = _split_files(folder, entry, entry.test) if entry.test is not None else []
    # a kind's files are the user's own, which need no test split; a named task is measured on its own one
    needed = bool(entry.name) and entry.test is not None
    require(test or not needed, f"data.path: {folder} has no {_expected(entry, entry.test or '')}")
    more = {prefix: _split_files(folder, entry, split) for prefix, split in entry.more_tests.items()}
    to_train = _split_files(folder, entry, entry.train) if train or not test else []
    require(to_train or (test and not train), f"data.path: {folder} has no {_expected(entry, entry.train)}")
    return Splits(
        _read_files(to_train) if to_train else None,
        _read_files(test) if test else None,
        {prefix: _read_files(files) for prefix, files in more.items() if files},
    )


def _split_files(folder: Path, entry: TaskEntry, split: str) -> list[Path]:
    """The files of a split: <split>.<suffix>, or shards as the hub has them; the configuration's folder comes first."""
    _, _, configuration = _hub_parts(entry)
    for place in (folder / configuration if configuration else folder / DATA_FOLDER, folder):
        one = with_suffix(place / split)
        files = [one] if one is not None else sorted(place.glob(f"{split}-*-of-*.parquet"))
        if files:
            return files
    return []


def _read_files(files: list[Path]) -> Split:
    if len(files) == 1:
        return Split(read_file(files[0], "data.path"), str(files[0]))
    return Split(concatenate_datasets([read_file(file, "data.path") for file in files]), str(files[0].parent))


def _of_hub(entry: TaskEntry, train: bool) -> Splits:
    with _hub_named(entry):
        return Splits(
            _hub_split(entry, entry.train) if train or entry.test is None else None,
            _hub_split(entry, entry.test) if entry.test is not None else None,
            {prefix: _hub_split(entry, split) for prefix, split in entry.more_tests.items()},
        )


@contextmanager
def _hub_named(entry: TaskEntry) -> Iterator[None]:
    """Where the hub is not reached, say which files would do instead."""
    try:
        yield
    except HubNotReachedError as error:
        splits = [entry.train, *([entry.test] if entry.test else []), *entry.more_tests.values()]
        files = " and ".join(f"FOLDER/{_expected(entry, split)}" for split in splits)
        raise LightPeftError(
            f"task {entry.name}: the hub was not reached for data set {entry.hub}; put its rows into {files} "
            "and give --data.path FOLDER, or set HF_DATASETS_OFFLINE=1 if it was loaded on this machine before"
        ) from error


def _hub_split(entry: TaskEntry, split: str) -> Split:
    return Split(read_hub(f"{entry.hub}:{split}", f"task {entry.name}"), f"{entry.hub}:{split}")


def _expected(entry: TaskEntry, split: str) -> str:
    _, _, configuration = _hub_parts(entry)
    return f"{configuration + '/' if configuration else ''}{split}{{{','.join(READERS)}}}"


def _hub_parts(entry: TaskEntry) -> tuple[str, str, str]:
    """Owner, name and configuration of the data set on the hub; empty where there is none."""
    owner, _, rest = (entry.hub or "").partition("/")
    name, _, configuration = rest.partition("/")
    return owner, name, configuration
