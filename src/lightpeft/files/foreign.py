"""Checks of untrusted model folders before libraries read them, and one-line errors where those fail."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError

from lightpeft.errors import LightPeftError, one_line, require
from lightpeft.files import parse_json, read_text

GATED = "a gated repository; request access on its page, then log in (hf auth login), or give a token"
"""Reason and remedy where the hub refuses a repository's files."""
_KERNEL = re.compile(r"\w*_implementation")
"""Settings that may name code on the hub, as owner/name, instead of an implementation of transformers."""
_KERNELS = ("use_kernels", "kernel_config")


@contextmanager
def parsing(what: str, instead: str = "") -> Iterator[None]:
    """Turn any error that a library raises inside the block into a `LightPeftError` of one line.

    Libraries do not document the errors of their parsers: unpickling errors, missing keys, attributes of numbers. An
    out-of-memory error passes through, since it says nothing about the file.

    Args:
        what: the beginning of the message: the problem.
        instead: the end of the message: the remedy.
    """
    try:
        yield
    except (LightPeftError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise LightPeftError(f"{what}: {reason_of(error)}{f'; {instead}' if instead else ''}") from error


def reason_of(error: BaseException) -> str:
    """Return the message of a library's error on one line, with its type where the message alone is unclear."""
    if isinstance(error.__cause__, GatedRepoError):  # transformers' error names it and says much more
        return f"it is {GATED}"
    text = one_line(error, 300)
    return text if isinstance(error, (OSError, ValueError, RuntimeError)) and text else f"{type(error).__name__} {text}"


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON configuration file of another library.

    Raises:
        LightPeftError: the file is missing, too large, or holds no JSON object.
    """
    data = parse_json(read_text(path), path)
    require(isinstance(data, dict), f"{path} does not hold a JSON object")
    return dict(data)


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Check that a model's configuration does not ask for code from the hub.

    Raises:
        LightPeftError: the configuration names such code.
    """
    for key, value in _settings(config):
        named = isinstance(value, str) and "/" in value and _KERNEL.fullmatch(key)
        require(
            not named and not (value and key in _KERNELS),
            f"{where} asks for code from the hub ({key}); remove {key} from config.json, and choose a kernel yourself",
        )


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield all keys with their values, nested mappings included; the entries of a list come under the list's key."""
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
        LightPeftError: the folder has pickled weights only.
    """
    if allow_pickle:
        return
    names = {path.name for path in folder.iterdir()}
    safe = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    require(
        safe or not pickled,
        f"{folder} has its weights in pickle files ({', '.join(pickled[:1])}), not as safetensors; save it again, or "
        "set allow_pickle if you trust its author",
    )
