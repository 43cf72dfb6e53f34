"""Model folders that anybody may have made: looked at before libraries believe them, and understood when those fail."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightpeft.errors import LightPeftError, one_line, require
from lightpeft.files import parse_json, read_text

_CONFIG_LIMIT = 4 * 2**20
"""Bytes that a configuration may have: names of 20,000 classes take a tenth of it."""
_FILE_LIMIT = 256 * 2**20
"""Bytes that any other JSON or text file beside the weights may have; the largest tokenizers have 60 million."""
_MOST_FILES = 10_000
_CONFIGS = re.compile(r"(\w+_)?config(\.[\d.]+)?\.json")
_TEXTS = (".json", ".jinja", ".txt", ".model", ".py")
_KEPT_IN = ("", "additional_chat_templates")
"""Folders, within that of a model, that libraries read."""

_COUNT = re.compile(r"((num|n)_\w*|(en|de)coder_)?(layers?|experts?|blocks?|stages|codebooks|labels?)|depth")
"""Settings of a model that say how many parts are made; parts take time and memory even without weights."""
_MOST_PARTS = 2_000
_MOST_PARTS_OF_PARTS = 100_000
"""Of layers times experts."""
_MOST_LABELS = 100_000
_SIZE = re.compile(r"\w*(size|dim|embd|inner|positions?|position_embeddings|vocab)")
_LARGEST_SIZE = 2**31 - 1
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
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of libraries in Rust, whose bugs are no `Exception`
            raise
        raise LightPeftError(f"{what}: {reason_of(error)}{f'; {instead}' if instead else ''}") from error


def reason_of(error: BaseException) -> str:
    """What an error of a library says, on one line; its kind as well where that says more than the message."""
    text = one_line(error, 300)
    return text if isinstance(error, (OSError, ValueError, RuntimeError)) and text else f"{type(error).__name__} {text}"


def check_folder(folder: Path) -> None:
    """Check what libraries open in a model's folder: regular files, none larger than such files are.

    Raises:
        LightPeftError: a pipe or a device, which may never end, or a file that would fill the memory.
    """
    for place in (folder / name for name in _KEPT_IN):
        for number, path in enumerate(sorted(place.iterdir()) if place.is_dir() else ()):
            require(number < _MOST_FILES, f"{place} has more than {_MOST_FILES:,} files")
            _check_file(path)


def _check_file(path: Path) -> None:
    try:
        found = path.stat()
    except OSError:  # a link to nothing: whoever needs it says so
        return
    regular = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
    require(regular, f"{path} is not a regular file; a model folder has no pipes or devices")
    limit = _CONFIG_LIMIT if _CONFIGS.fullmatch(path.name) else _FILE_LIMIT
    large = path.suffix in _TEXTS and found.st_size > limit
    require(not large, f"{path} is larger than {limit // 2**20} MiB, which no such file should be")


def read_config(path: Path) -> dict[str, Any]:
    """A configuration in JSON of another library's.

    Raises:
        LightPeftError: it is missing, too large, or no JSON object.
    """
    data = parse_json(read_text(path, _CONFIG_LIMIT), path)
    require(isinstance(data, dict), f"{path} does not hold a JSON object")
    return dict(data)


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Check a model's configuration before anything is made of it.

    Raises:
        LightPeftError: it asks for more parts, or larger ones, than models have, or for code from the hub.
    """
    require(isinstance(config.get("model_type", ""), str), f"{where} has a model_type that is no text")
    parts = {"layer": 1.0, "expert": 1.0}
    for key, value in _settings(config):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            _check_number(key, value, where)
            parts |= {part: max(most, value) for part, most in parts.items() if part in key and _COUNT.fullmatch(key)}
        named = isinstance(value, str) and "/" in value and _KERNEL.fullmatch(key)
        require(
            not named and not (value and key in _KERNELS),
            f"{where} asks for code from the hub ({key}); take it out of config.json, and name a kernel yourself",
        )
    most = parts["layer"] * parts["expert"]
    require(most <= _MOST_PARTS_OF_PARTS, f"{where} asks for {most:,.0f} experts in its layers, which no model has")


def _check_number(key: str, value: float, where: str) -> None:
    limit = float("inf")
    if _COUNT.fullmatch(key):
        limit = _MOST_LABELS if "label" in key else _MOST_PARTS
    elif _SIZE.fullmatch(key):
        limit = _LARGEST_SIZE
    require(value <= limit, f"{where} says {key} is {value:.3g}, and no model has more than {limit:,}")


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
        LightPeftError: it has pickled ones alone, or an index that names them.
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
    for index in folder.glob("*.safetensors.index.json"):
        shards = parse_json(read_text(index, _FILE_LIMIT), index)
        listed = shards.get("weight_map") if isinstance(shards, dict) else None
        fits = isinstance(listed, dict) and all(_is_shard(name) for name in set(map(str, listed.values())))
        require(fits, f"{index} names other files than the safetensors files beside it")


def _is_shard(name: str) -> bool:
    return name.endswith(".safetensors") and Path(name).name == name
