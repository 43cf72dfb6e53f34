"""What others may have written: bounded in size, checked in form, compared with its checksum, then believed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from lightpeft.errors import LightPeftError, one_line, require

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 2
"""Version of every JSON file written here; files of a newer version are refused. Those from 2 on have a checksum."""
_DATA_LIMIT = 16 * 2**20
"""Bytes that a JSON file may have: a plan for 100 layers of 30,000 neurons has about 5 million."""
CHECKSUM = "checksum"
"""Key of a JSON file's SHA-256 over all else in it."""
CHECKSUMS = "checksums.json"
"""File that says what else is in a sealed folder."""


def read_text(path: str | Path, limit: int = _DATA_LIMIT) -> str:
    """The text of a regular file.

    Raises:
        LightPeftError: it is missing, no regular file, too large, or not UTF-8.
    """
    path = Path(path)
    try:
        require(path.is_file() or not path.exists(), f"{path} is not a regular file")
        large = f"{path} is larger than {limit // 2**10} KiB, which no such file should be"
        require(path.stat().st_size <= limit, large)
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise LightPeftError(f"{path} does not exist") from error
    except UnicodeDecodeError as error:
        raise LightPeftError(f"{path} cannot be read: it is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise LightPeftError(f"{path} cannot be read: {error.strerror or error}") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        LightPeftError: the file is missing, not JSON, of a newer schema, or not as it was written.
    """
    data = parse_json(read_text(path), path)
    require(isinstance(data, dict), f"{path} does not hold a JSON object")
    version = data.get("schema_version")
    known = type(version) is int and 1 <= version <= SCHEMA_VERSION
    newer = f"{path} has schema version {str(version)[:20]}, this lightpeft reads up to {SCHEMA_VERSION}"
    require(known, f"{newer}; upgrade lightpeft")
    checksum = data.pop(CHECKSUM, None)
    require(version == 1 or checksum == content_checksum(data), f"{path} was altered or damaged")
    return data


def parse_json(text: str, path: str | Path) -> Any:
    """A JSON value; `path` names it in the line about what it is not."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LightPeftError(f"{path} cannot be read: {error}") from error


def content_checksum(content: dict[str, Any]) -> str:
    """SHA-256 of plain data as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        LightPeftError: the file is missing or damaged.
    """
    from safetensors.torch import load_file  # settings are read before PyTorch is needed

    require(Path(path).is_file(), f"{path} does not exist, or is no file")
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise LightPeftError(f"{path} cannot be read: {one_line(error)}") from error


def check_sealed(folder: Path) -> None:
    """Check that every file of a folder is as it was when the folder was sealed (`writing.seal`).

    Raises:
        LightPeftError: one is missing or altered, or the folder was never sealed.
    """
    seals = read_json(folder / CHECKSUMS)
    with understandable(folder / CHECKSUMS):
        files = dict(seals["files"])
    for name, checksum in files.items():
        check_file(folder, name, checksum)


def check_file(folder: Path, name: str, checksum: Any) -> None:
    """Check that a file of a folder has a checksum.

    Raises:
        LightPeftError: it is missing or altered.
    """
    require(name and not Path(name).is_absolute() and ".." not in Path(name).parts, f"{folder} names a file outside it")
    require((folder / name).is_file(), f"{folder} is incomplete: {name} is missing")
    require(file_checksum(folder / name) == checksum, f"{folder / name} was altered or damaged")


@contextmanager
def understandable(path: str | Path) -> Iterator[None]:
    """Turn the errors of reading unexpected content into one line about the file."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = str(error) if isinstance(error, LightPeftError) else repr(error)[:300]
        raise LightPeftError(f"{path} does not have the expected content ({reason}); was it edited?") from error
