"""Tells local files and folders in settings from names on the hub, and checks that they exist."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lightpeft.config.run import RunConfig
from lightpeft.errors import require

HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.\[\]%:+-]+))?")
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w{0,7}")


def local_path(source: str) -> Path:
    """Return a path, with the home folder for `~`; `~name` of an unknown user stays, and names no file."""
    return Path(os.path.expanduser(source))  # noqa: PTH111 (Path.expanduser raises for an unknown user)


def is_local(source: str) -> bool:
    """Return True if `source` is the path of a file (existing or not), not the name of a hub data set."""
    path = local_path(source)
    looks_like_file = path.is_absolute() or source.startswith((".", "~")) or _FILE_SUFFIX.fullmatch(path.suffix)
    return path.exists() or bool(looks_like_file) or HUB_NAME.fullmatch(source) is None


def check_places(config: RunConfig) -> None:
    """Check that all files and folders of a run's model and data exist; nothing is read.

    Raises:
        LightPeftError: one of them does not exist.
    """
    check_model_folder(config.model.name)
    for what, source in (("data.train", config.data.train), ("data.test", config.data.test)):
        if source and is_local(source):
            check_file(local_path(source), what)
    if config.data.path is not None:
        check_folder(local_path(config.data.path), "data.path")


def check_model_folder(name: str) -> None:
    """Raise `LightPeftError` if a model's name is that of a folder, not of the hub, and the folder does not exist."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    there = os.path.isdir(local_path(name))  # noqa: PTH112 (never raises)
    require(there or not looks_local, f"model folder {name} does not exist")


def check_file(path: Path, what: str) -> None:
    """Raise `LightPeftError` if there is nothing at the path; errors name the setting `what`."""
    require(path.exists(), f"{what}: file {path} does not exist")


def check_folder(path: Path, what: str) -> None:
    """Raise `LightPeftError` if there is no folder at the path; errors name the setting `what`."""
    require(path.is_dir(), f"{what}: folder {path} does not exist")
