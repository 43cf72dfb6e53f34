"""Files and folders that appear whole or not at all, whatever ends the process and whatever lay there before."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from safetensors import SafetensorError

from lightpeft.errors import LightPeftError, one_line, require
from lightpeft.files.locks import hold_temporary, is_dead
from lightpeft.files.places import resolved
from lightpeft.files.reading import CHECKSUM, CHECKSUMS, SCHEMA_VERSION, content_checksum, file_checksum

if TYPE_CHECKING:
    from torch import Tensor

_SUFFIX = ".tmp"
"""Temporary files and folders are called .<name>.<random><suffix>, beside what they will be."""
_OLD = ".old.tmp"
"""Ending of what is in the way of a folder, where two folders cannot change places in one step."""


def check_vacant(folder: Path, *, replaceable: bool, overwrite: bool) -> None:
    """Refuse a folder with something in it that is not to be replaced.

    Args:
        replaceable: what is there is of the kind that is about to be written.
        overwrite: such may be replaced.

    Raises:
        LightPeftError: with what to give instead.
    """
    instead = "a new folder, or overwrite what is there (--overwrite)" if replaceable else "a new folder"
    # what a killed process left half-written in a folder that stays is removed by who writes to it next
    empty = not folder.is_dir() or all(_is_temporary(path) for path in folder.iterdir())
    require(empty or (overwrite and replaceable), f"{folder} is not empty; give {instead}")


def write_json(path: str | Path, data: Mapping[str, Any], depth: int | None = None) -> None:
    """Write `data` with the schema version and a checksum of it all; it takes the place of `path` when it is complete.

    Args:
        depth: levels that have a line for each entry; None: all.

    Raises:
        LightPeftError: it cannot be written, or has a number that is NaN or infinite.
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


def write_text(path: str | Path, text: str, *, new: bool = False) -> None:
    """Write a text that takes the place of `path` when it is complete.

    Args:
        new: nothing may be there.

    Raises:
        LightPeftError: it cannot be written.
    """
    with replacing(path, new=new) as file:
        file.write(text)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, straight to its place: into a folder that is not there yet for others.

    Raises:
        LightPeftError: it cannot be written.
    """
    from safetensors.torch import save_file  # as in `reading.read_tensors`

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        raise LightPeftError(f"cannot write {path}: {one_line(error)}") from error


@contextmanager
def replacing(path: str | Path, *, new: bool = False) -> Iterator[TextIO]:
    """A text file that takes the place of `path` when it is complete, and vanishes if writing fails.

    Args:
        new: nothing may be there, also where two processes find nothing at the same time.

    Raises:
        LightPeftError: it cannot be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clean(path.parent, path.name)
        descriptor, name = tempfile.mkstemp(prefix=_prefix(path.name), suffix=_SUFFIX, dir=path.parent)
        temporary = Path(name)
        hold_temporary(descriptor)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            _open_to_users(temporary)
            os.fsync(descriptor)
            if new:
                os.link(temporary, path)
            else:
                temporary.replace(path)
        _sync_names(path.parent)
    except UnicodeEncodeError as error:
        raise LightPeftError(f"cannot write {path}: it would hold half a character; nothing was changed") from error
    except OSError as error:
        raise LightPeftError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(
    folder: str | Path, last: str, *, alone: bool = False, obsolete: Iterable[str] = ()
) -> Iterator[Path]:
    """A temporary folder whose files are in `folder` when the block ends well; other files there stay.

    The new folder changes places with the old one in one step, so that at every moment one of them is there, whole. A
    folder that holds the working directory, or is a mount point, stays, for whoever stands in it would be left in one
    that is gone: there the old files go first and the new ones come one by one.

    Args:
        last: name of the file that says that the result is there. In a folder that stays, the old one goes before
            anything else, and the new one comes last.
        alone: other files do not stay.
        obsolete: names of an earlier result's files, or patterns of names: these go, whether or not new ones come.

    Raises:
        LightPeftError: the disk is full or the place cannot be written; nothing of `folder` has changed, or the line
            says that it has.
    """
    folder = Path(folder)
    temporary: Path | None = None
    descriptor: int | None = None
    outcome = "nothing was changed"
    try:
        target = resolved(folder)
        stays = _is_mount(target) or _holds_working_directory(target)
        place = target if stays else target.parent
        place.mkdir(parents=True, exist_ok=True)
        require(not target.exists() or target.is_dir(), f"cannot write {folder}: it is a file; nothing was changed")
        clean(place, target.name)
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(target.name), suffix=_SUFFIX, dir=place))
        descriptor = os.open(temporary, os.O_RDONLY)
        hold_temporary(descriptor)
        yield temporary
        _settle(temporary)
        if stays:
            outcome = "it is incomplete now; write it again"
            _move_files(temporary, target, last, ("*",) if alone else tuple(obsolete))
        elif target.exists():
            if not alone:
                _take_along(target, temporary, tuple(obsolete))
            _exchange(temporary, target)
        else:
            temporary.rename(target)
        _sync_names(place)
    except (OSError, SafetensorError) as error:
        raise LightPeftError(f"cannot write {folder}: {one_line(error)}; {outcome}") from error
    finally:
        if descriptor is not None:
            os.close(descriptor)
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write down the SHA-256 of every file in a folder, for `reading.check_sealed`; before it is moved into place."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    write_json(folder / CHECKSUMS, {"files": {str(path.relative_to(folder)): file_checksum(path) for path in files}})


def clean(place: Path, name: str = "") -> None:
    """Remove from a folder what processes that are gone left half-written, of one name or of all.

    What such a process had taken out of the way comes back.
    """
    for path in place.glob(f".{_escaped(name)}*{_SUFFIX}"):
        if not _is_temporary(path, name) or not is_dead(path):
            continue
        if path.name.endswith(_OLD):
            home = path.with_name(path.name[1 : -len(_OLD)].rpartition(".")[0])
            if not home.exists():
                path.rename(home)
                continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def _is_temporary(path: Path, name: str = "") -> bool:
    """Whether a path is called as temporary ones are: of a name, or of any."""
    if not (path.name.startswith(".") and path.name.endswith(_SUFFIX)):
        return False
    stem = path.name.removesuffix(_OLD).removesuffix(_SUFFIX)
    of, _, random = stem[1:].rpartition(".")
    return bool(of) and len(random) == 8 and (not name or of == name[:_LONGEST])


_LONGEST = 200
"""Characters of a name that its temporary names repeat: file systems take 255 bytes."""


def _prefix(name: str) -> str:
    return f".{name[:_LONGEST]}."


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name[:_LONGEST])


def _open_to_users(path: Path) -> None:
    """Temporary files are their maker's alone; what stays is for whom the user's umask says."""
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())


def _umask() -> int:
    current = os.umask(0o077)  # it cannot be read without being set
    os.umask(current)
    return current


def _settle(folder: Path) -> None:
    """Make a folder as lasting and as readable as it is to be when it is moved into place."""
    for path in (*folder.rglob("*"), folder):
        if path.is_symlink():
            continue
        _open_to_users(path)
        _sync(path)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # folders of Windows cannot be opened
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems that need no such call
            raise
    finally:
        os.close(descriptor)


def _sync_names(folder: Path) -> None:
    """Wait until what was moved into a folder is on the disk; it is in place, whether or not that can be waited for."""
    with suppress(OSError):
        _sync(folder)


def _take_along(source: Path, folder: Path, obsolete: tuple[str, ...]) -> None:
    """Give a new folder what else an old one holds, without copying it where the file system can."""

    def link(file: str, to: str) -> None:
        try:
            os.link(file, to, follow_symlinks=False)
        except OSError:
            shutil.copy2(file, to, follow_symlinks=False)

    for entry in source.iterdir():
        place = folder / entry.name
        if place.exists() or place.is_symlink() or _is_temporary(entry) or _is_one_of(entry, obsolete):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, place, symlinks=True, copy_function=link)
        else:
            link(str(entry), str(place))


def _is_one_of(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path.name, pattern) for pattern in patterns)


def _move_files(source: Path, folder: Path, last: str, obsolete: tuple[str, ...]) -> None:
    """Replace the files of a folder that stays; whenever that ends, old and new files are not there together."""
    _remove(folder / last)
    _sync_names(folder)
    for entry in list(folder.iterdir()):
        goes = _is_one_of(entry, obsolete) or (source / entry.name).exists()
        if goes and entry != source and not _holds_working_directory(entry):
            _remove(entry)
    for entry in sorted(source.iterdir(), key=lambda entry: (entry.name == last, entry.name)):
        if entry.name == last:
            _sync_names(folder)
        entry.replace(folder / entry.name)


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; of a link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _holds_working_directory(folder: Path) -> bool:
    """Whether this process, and the shell that it was started from, works in a folder or below it."""
    try:
        here = Path.cwd()
    except OSError:  # somebody has removed it
        return False
    return here.is_relative_to(folder)


def _is_mount(folder: Path) -> bool:
    if folder.is_mount():
        return True
    try:
        mounts = _MOUNTS.read_bytes().splitlines()
    except OSError:  # systems that have no such list
        return False
    # a part of the same disk that is mounted here looks like any other folder to `is_mount`
    escaped = b"".join(b"\\%03o" % byte if byte in b" \t\n\\" else bytes([byte]) for byte in os.fsencode(folder))
    return any(line.split(b" ")[4] == escaped for line in mounts)


_MOUNTS = Path("/proc/self/mountinfo")
"""Linux's list of what is mounted, each place as the fifth word of a line."""


def _exchange(one: Path, other: Path) -> None:
    """Let two folders change places, in one step where the system can; `one` may be gone afterwards."""
    if exchange_at_once(one, other):
        return
    old = one.with_name(one.name.removesuffix(_SUFFIX) + _OLD)
    other.rename(old)
    try:
        one.rename(other)
    except OSError:
        old.rename(other)
        raise
    shutil.rmtree(old, ignore_errors=True)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Of Linux's renameat2."""


def exchange_at_once(one: Path, other: Path) -> bool:
    """Have two folders change places in one step; False where the system has none for it, and nothing was done."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    done = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Append one JSON line, stamped with the time.

    Raises:
        LightPeftError: the file cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), **entry}) + "\n")
    except OSError as error:
        raise LightPeftError(f"cannot write {path}: {error.strerror or error}") from error
