"""The rows of a task: from files that the run names, a folder in the hub's layout, or a hub data set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from lightpeft.app.tasks.rows.reading import (
    READERS,
    HubNotReachedError,
    read_file,
    read_hub,
    read_rows,
    with_suffix,
)
from lightpeft.config import DataConfig, TaskEntry
from lightpeft.config.places import check_folder, is_local, local_path
from lightpeft.errors import LightPeftError, require

DATA_FOLDER = "data"
"""Folder in a hub repository with the files of its only configuration."""


@dataclass(frozen=True)
class Split:
    """Rows as read from their source, with a name for error messages."""

    rows: Dataset
    what: str
    """Name in error messages: the setting, and the file if there is one."""


@dataclass(frozen=True)
class Splits:
    """All splits of a task, as read from their sources."""

    train: Split | None
    """None: not needed."""
    test: Split | None
    """None: test rows are to be held out of the training rows."""
    more_tests: dict[str, Split]
    """Prefix of the metrics -> further test rows."""


def read_splits(entry: TaskEntry, config: DataConfig, train: bool = True) -> Splits:
    """Read the task's rows: from `data.train` and `data.test`, else `data.path` or the entry's folder, else the hub.

    Args:
        train: False to read training rows only if test rows have to be held out of them.

    Raises:
        LightPeftError: a source is missing or cannot be read, or the hub cannot be reached.
    """
    path = config.path or entry.path
    test = _read_setting(config.test, "data.test") if config.test is not None and (config.train or not train) else None
    if test is not None and not train:
        return Splits(None, test, {})
    if config.train or (train and path is None and entry.hub is None):
        return Splits(_read_setting(config.train, "data.train"), test, {})
    require(
        config.test is None, "data.test is set without data.train; set both, or set data.path to the folder of a task"
    )
    require(
        path is not None or entry.hub is not None,
        "no test rows are given; set --data.test to a file, or --data.task to a task with its own data",
    )
    return _read_hub_splits(entry, train) if path is None else _read_folder(local_path(path), entry, train)


def hub_rows(entry: TaskEntry, config: DataConfig) -> dict[str, str]:
    """Return "train" and "test" -> name of the rows on the hub, as [owner/]name[/config][:split].

    Rows that `read_splits` reads from files are left out, since paths say nothing elsewhere.
    """
    if config.train:
        named = {"train": config.train, "test": config.test or config.train}
    elif config.path or entry.path or entry.hub is None:
        return {}
    else:
        named = {"train": f"{entry.hub}:{entry.train}", "test": f"{entry.hub}:{entry.test or entry.train}"}
    return {part: name for part, name in named.items() if not is_local(name)}


def _read_setting(source: str, setting: str) -> Split:
    """Read the rows that the setting names."""
    rows = read_rows(source, setting)
    return Split(rows, f"{source}: {setting}" if is_local(source) else setting)


def _read_folder(folder: Path, entry: TaskEntry, train: bool) -> Splits:
    check_folder(folder, "data.path")
    test = _split_files(folder, entry, entry.test) if entry.test is not None else []
    # files of a kind are the user's own and need no test split; a named task needs its own one
    needed = bool(entry.name) and entry.test is not None
    require(
        test or not needed, f"data.path: {folder} has no test file {_expected_file(entry, entry.test or '')}; add it"
    )
    more = {prefix: _split_files(folder, entry, split) for prefix, split in entry.more_tests.items()}
    to_train = _split_files(folder, entry, entry.train) if train or not test else []
    require(
        to_train or (test and not train),
        f"data.path: {folder} has no training file {_expected_file(entry, entry.train)}; add it",
    )
    return Splits(
        _read_files(to_train) if to_train else None,
        _read_files(test) if test else None,
        {prefix: _read_files(files) for prefix, files in more.items() if files},
    )


def _split_files(folder: Path, entry: TaskEntry, split: str) -> list[Path]:
    """Return the files of a split: <split>.<suffix> or Parquet shards, first in the configuration's folder."""
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


def _read_hub_splits(entry: TaskEntry, train: bool) -> Splits:
    with _suggest_local_files(entry):
        return Splits(
            _read_hub_split(entry, entry.train) if train or entry.test is None else None,
            _read_hub_split(entry, entry.test) if entry.test is not None else None,
            {prefix: _read_hub_split(entry, split) for prefix, split in entry.more_tests.items()},
        )


@contextmanager
def _suggest_local_files(entry: TaskEntry) -> Iterator[None]:
    """Turn a failure to reach the hub into a message that names local files to use instead."""
    try:
        yield
    except HubNotReachedError as error:
        splits = [entry.train, *([entry.test] if entry.test else []), *entry.more_tests.values()]
        files = " and ".join(f"FOLDER/{_expected_file(entry, split)}" for split in splits)
        raise LightPeftError(
            f"task {entry.name}: the hub cannot be reached for data set {entry.hub}; put its rows into {files} "
            "and set --data.path FOLDER, or set HF_DATASETS_OFFLINE=1 if it is in the cache of this machine"
        ) from error


def _read_hub_split(entry: TaskEntry, split: str) -> Split:
    return Split(read_hub(f"{entry.hub}:{split}", f"task {entry.name}"), f"{entry.hub}:{split}")


def _expected_file(entry: TaskEntry, split: str) -> str:
    _, _, configuration = _hub_parts(entry)
    return f"{configuration + '/' if configuration else ''}{split}{{{','.join(READERS)}}}"


def _hub_parts(entry: TaskEntry) -> tuple[str, str, str]:
    """Return owner, name and configuration of the hub data set; "" for a missing part."""
    owner, _, rest = (entry.hub or "").partition("/")
    name, _, configuration = rest.partition("/")
    return owner, name, configuration
