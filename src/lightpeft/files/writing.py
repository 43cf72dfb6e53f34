"""Files and folders that appear whole or not at all, whatever ends the process and whatever lay there before."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from safetensors import SafetensorError

from lightpeft.errors import LightPeftError, one_line, require
from lightpeft.files.locks import LOCK
from lightpeft.files.reading import CHECKSUM, CHECKSUMS, SCHEMA_VERSION, content_checksum, file_checksum

if TYPE_CHECKING:
    from torch import Tensor

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_LONGEST_NAME = 60
"""Maximum number of characters of a name that its temporary name repeats; file systems allow 255 bytes, and a character
has up to four."""


def check_vacant(folder: Path, *, replaceable: bool, overwrite: bool) -> None:
    """Check that a folder is empty, or that its content may be replaced.

    Args:
        replaceable: the folder holds a result of the same kind as the one to write.
        overwrite: the user allows to replace such a result.

    Raises:
        LightPeftError: the folder holds something that may not be replaced.
    """
    instead = "a new folder, or overwrite what is there (--overwrite)" if replaceable else "a new folder"
    empty = not folder.is_dir() or all(map(is_own_file, folder.iterdir()))
    require(empty or (overwrite and replaceable), f"{folder} is not empty; give {instead}")


def check_no_folder(path: str | Path | None, what: str) -> None:
    """Check that a file can take the place of `path`; call it before the work.

    Args:
        path: the file to be written; None: none.
        what: name of the file in the error message.

    Raises:
        LightPeftError: there is a folder.
    """
    require(path is None or not Path(path).is_dir(), f"{what} {path} is a folder; give a file")


def write_json(path: str | Path, data: Mapping[str, Any], depth: int | None = None) -> None:
    """Write `data` as JSON with the schema version and a checksum; it replaces `path` when it is complete.

    Args:
        depth: number of nesting levels that have one line for each entry; None: all levels.

    Raises:
        LightPeftError: the file cannot be written, or a number is NaN or infinite.
    """
    try:
        # as a reader will see it: JSON turns integer keys into strings
        content = json.loads(json.dumps({"schema_version": SCHEMA_VERSION, **data}, allow_nan=False))
    except ValueError as error:
        raise LightPeftError(f"cannot write {path}: a number in it is NaN or infinite; nothing was changed") from error
    content.pop(CHECKSUM, None)
    whole = {**content, CHECKSUM: content_checksum(content)}
    write_text(path, (json.dumps(whole, indent=1) if depth is None else _in_lines(whole, depth)) + "\n")


def _in_lines(content: Any, depth: int) -> str:
    if not depth or not content or not isinstance(content, dict | list):
        return json.dumps(content)
    if isinstance(content, list):
        return "[\n" + ",\n".join(_in_lines(value, depth - 1) for value in content) + "\n]"
    return (
        "{\n"
        + ",\n".join(f"{json.dumps(name)}: {_in_lines(value, depth - 1)}" for name, value in content.items())
        + "\n}"
    )


def write_text(path: str | Path, text: str) -> None:
    """Write a text file that replaces `path` when it is complete.

    Raises:
        LightPeftError: the file cannot be written.
    """
    with replacing(path) as file:
        file.write(text)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file directly to `path`, which lies in a temporary folder (see `replacing_folder`).

    Raises:
        LightPeftError: the file cannot be written.
    """
    from safetensors.torch import save_file  # as in `reading.read_tensors`

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        raise LightPeftError(f"cannot write {path}: {one_line(error)}") from error


@contextmanager
def replacing(path: str | Path) -> Iterator[TextIO]:
    """Open a temporary text file that replaces `path` when the block ends, and is removed if writing fails.

    Raises:
        LightPeftError: the file cannot be written.
    """
    path = Path(path)
    temporary = _temporary(path.parent, path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("x", encoding="utf-8", newline="") as file:
            yield file
        temporary.replace(path)
    except UnicodeEncodeError as error:
        raise LightPeftError(f"cannot write {path}: its text has half a character; nothing was changed") from error
    except OSError as error:
        raise LightPeftError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
    finally:
        with suppress(OSError):  # the parent may be no folder
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(
    folder: str | Path, last: str, *, alone: bool = False, obsolete: Iterable[str] = ()
) -> Iterator[Path]:
    """Open a temporary folder whose files move into `folder` when the block ends; other files in `folder` stay.

    A new folder appears in one step. In an existing folder, the file `last` is removed before any other file changes,
    and the new one is written after all others, so that a folder with this file is complete.

    Args:
        last: name of the file that marks a complete result.
        alone: remove all other files from `folder`.
        obsolete: names, or patterns of names, of an earlier result's files, which are removed in any case.

    Raises:
        LightPeftError: the disk is full or the folder cannot be written; the message says whether `folder` has changed.
    """
    folder = Path(folder)
    outcome = "nothing was changed"
    temporary: Path | None = None
    try:
        target = Path(os.path.realpath(folder))  # unlike Path.resolve, it accepts circular links
        there = target.exists()
        require(not there or target.is_dir(), f"cannot write {folder}: it is a file; nothing was changed")
        temporary = _temporary(target if there else target.parent, target.name)  # on the same disk, to be renamed
        temporary.mkdir(parents=True)
        yield temporary
        if there:
            outcome = "it is incomplete now; write it again"
            _move_files(temporary, target, last, ("*",) if alone else tuple(obsolete))
        else:
            temporary.rename(target)
    except (OSError, SafetensorError) as error:
        raise LightPeftError(f"cannot write {folder}: {one_line(error)}; {outcome}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write the SHA-256 of every file in a folder into it, for `reading.check_sealed`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    write_json(folder / CHECKSUMS, {"files": {str(path.relative_to(folder)): file_checksum(path) for path in files}})


def is_own_file(path: Path) -> bool:
    """Return whether a file is a lock or a temporary file of this package."""
    return path.name == LOCK or _TEMPORARY.fullmatch(path.name) is not None


def clean(place: Path) -> None:
    """Remove temporary files of killed processes below a folder whose lock this process holds."""
    for path in list(place.rglob(".*.tmp")):
        if _TEMPORARY.fullmatch(path.name):
            _remove(path)


def _temporary(place: Path, name: str) -> Path:
    """Return an unused path in `place` for a file or folder that will be renamed to `name`."""
    return place / f".{name[:_LONGEST_NAME]}.{secrets.token_hex(4)}.tmp"


def _move_files(source: Path, folder: Path, last: str, obsolete: tuple[str, ...]) -> None:
    """Replace files of a folder in an order in which no interruption leaves a mix of old and new files with `last`."""
    _remove(folder / last)
    for entry in list(folder.iterdir()):
        goes = (source / entry.name).exists() or any(fnmatchcase(entry.name, pattern) for pattern in obsolete)
        if goes and entry != source:
            _remove(entry)
    for entry in sorted(source.iterdir(), key=lambda entry: (entry.name == last, entry.name)):
        entry.replace(folder / entry.name)


def _remove(path: Path) -> None:
    """Remove a file, a folder or a link (not its target), if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Append one JSON line with the current time to a file.

    Raises:
        LightPeftError: the file cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), **entry}) + "\n")
    except OSError as error:
        raise LightPeftError(f"cannot write {path}: {error.strerror or error}") from error
