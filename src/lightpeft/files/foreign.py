"""Model folders that anybody may have made: looked at before libraries believe them, and understood when those fail."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightpeft.errors import LightPeftError, one_line, require
from lightpeft.files import parse_json, read_text

_KERNEL = re.compile(r"\w*_implementation")
"""Settings that may name code on the hub, as owner/name, in place of what transformers has."""
_KERNELS = ("use_kernels", "kernel_config")


@contextmanager
def parsing(what: str, instead: str = "") -> Iterator[None]:
    """Turn whatever a library raises for a file that is not what it expects into one line.

    What parsers raise is no part of what they promise: errors of unpickling, of keys that are not there, of attributes
    that a number does not have. Only a lack of memory says nothing about the file.

    Args:
        what: happened, as the beginning of the line.
        instead: its end: what to do.
    """
    try:
        yield
    except (LightPeftError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise LightPeftError(f"{what}: {reason_of(error)}{f'; {instead}' if instead else ''}") from error


def reason_of(error: BaseException) -> str:
    """What an error of a library says, on one line; its kind as well where that says more than the message."""
    text = one_line(error, 300)
    return text if isinstance(error, (OSError, ValueError, RuntimeError)) and text else f"{type(error).__name__} {text}"


def read_config(path: Path) -> dict[str, Any]:
    """A configuration in JSON of another library's.

    Raises:
        LightPeftError: it is missing, too large, or no JSON object.
    """
    data = parse_json(read_text(path), path)
    require(isinstance(data, dict), f"{path} does not hold a JSON object")
    return dict(data)


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse a model's configuration that asks for code from the hub.

    Raises:
        LightPeftError: it does.
    """
    for key, value in _settings(config):
        named = isinstance(value, str) and "/" in value and _KERNEL.fullmatch(key)
        require(
            not named and not (value and key in _KERNELS),
            f"{where} asks for code from the hub ({key}); take it out of config.json, and name a kernel yourself",
        )


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All keys with their values, also of the parts of a model; of a list every value under the list's key."""
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        key, value = waiting.pop()
        yield key, value
        if isinstance(value, Mapping):
            waiting += value.items()
        elif isinstance(value, Sequence) and not isinstance(value, str):
            waiting += ((key, each) for each in value)


def check_weights(folder: Path, allow_pickle: bool) -> None:
    """Check that a model's folder has its weights as safetensors, unless pickle is allowed.

    Raises:
        LightPeftError: it has pickled ones alone.
    """
    if allow_pickle:
        return
    names = {path.name for path in folder.iterdir()}
    safe = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    require(
        safe or not pickled,
        f"{folder} has its weights pickled ({', '.join(pickled[:1])}), not as safetensors; save it again, or if you "
        "trust its author: allow_pickle",
    )
