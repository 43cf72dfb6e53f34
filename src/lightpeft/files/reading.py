"""Reading of untrusted files: limits of size, checks of the format, and checksums."""

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
"""Schema version of every JSON file that is written. Newer versions are refused; version 2 added the checksum."""
_DATA_LIMIT = 16 * 2**20
"""Maximum size of a JSON file in bytes; a plan for 100 layers of 30,000 neurons has about 5 million."""
CHECKSUM = "checksum"
"""Key of the SHA-256 of all other content of a JSON file."""
CHECKSUMS = "checksums.json"
"""File with the checksums of all other files of a sealed folder."""
_RESTORE = "was altered or damaged; restore the original file"


def read_text(path: str | Path, limit: int = _DATA_LIMIT) -> str:
    """Read the text of a regular file of at most `limit` bytes.

    Raises:
        LightPeftError: the file is missing, no regular file, too large, or not UTF-8.
    """
    path = Path(path)
    try:
        require(path.is_file() or not path.exists(), f"{path} is not a regular file")
        large = f"{path} is larger than {limit // 2**10} KiB, the limit for such files; give another file"
        require(path.stat().st_size <= limit, large)
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise LightPeftError(f"{path} does not exist") from error
    except UnicodeDecodeError as error:
        raise LightPeftError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise LightPeftError(f"{path} cannot be read: {error.strerror or error}") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that `write_json` wrote.

    Raises:
        LightPeftError: the file is missing, not JSON, of a newer schema version, or its checksum differs.
    """
    data = parse_json(read_text(path), path)
    require(isinstance(data, dict), f"{path} does not hold a JSON object")
    version = data.get("schema_version")
    known = type(version) is int and 1 <= version <= SCHEMA_VERSION
    newer = f"{path} has schema version {str(version)[:20]}, but this lightpeft reads versions up to {SCHEMA_VERSION}"
    require(known, f"{newer}; upgrade lightpeft")
    checksum = data.pop(CHECKSUM, None)
    require(version == 1 or checksum == content_checksum(data), f"{path} {_RESTORE}")
    return data


def parse_json(text: str, path: str | Path) -> Any:
    """Parse JSON text; `path` names the file in the error message."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LightPeftError(f"{path} cannot be read: it is not valid JSON ({error})") from error


def content_checksum(content: dict[str, Any]) -> str:
    """Compute the SHA-256 of plain data as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_checksum(path: Path) -> str:
    """Compute the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file onto the CPU.

    Raises:
        LightPeftError: the file is missing or damaged.
    """
    from safetensors.torch import load_file  # settings are read before PyTorch is needed

    require(Path(path).is_file(), f"{path} does not exist, or is not a file")
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise LightPeftError(f"{path} cannot be read: {one_line(error)}") from error


def check_sealed(folder: Path) -> None:
    """Check that every file of a folder is unchanged since the folder was sealed (`writing.seal`).

    Raises:
        LightPeftError: a file is missing or altered, or the folder was never sealed.
    """
    seals = read_json(folder / CHECKSUMS)
    with explain_content_errors(folder / CHECKSUMS):
        files = dict(seals["files"])
    for name, checksum in files.items():
        check_file(folder, name, checksum)


def check_file(folder: Path, name: str, checksum: Any) -> None:
    """Check that a file of a folder exists and has the given SHA-256.

    Raises:
        LightPeftError: the file is missing or altered.
    """
    require(name and not Path(name).is_absolute() and ".." not in Path(name).parts, f"{folder} names a file outside it")
    require((folder / name).is_file(), f"{folder} is incomplete: {name} is missing; copy it again")
    require(file_checksum(folder / name) == checksum, f"{folder / name} {_RESTORE}")


@contextmanager
def explain_content_errors(path: str | Path) -> Iterator[None]:
    """Turn errors about unexpected content inside the block into one `LightPeftError` about the file."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = str(error) if isinstance(error, LightPeftError) else repr(error)[:300]
        raise LightPeftError(
            f"{path} does not have the expected content ({reason}); restore the original file"
        ) from error
