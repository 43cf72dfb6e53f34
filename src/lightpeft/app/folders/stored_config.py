"""The config that a run folder holds, and how it differs from another."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import yaml

from lightpeft.config import READ_BY_PLANS, SWITCHES, RunConfig, run_config_from_dict
from lightpeft.config.validation import parse_yaml
from lightpeft.errors import require
from lightpeft.files import read_text

CONFIG = "config.yaml"
_SIGNATURE = "# sha256 of what is above: "
"""Start of config.yaml's last line, which detects a truncated config: it would be the config of another run."""


def is_run(folder: Path) -> bool:
    """Return True if a folder contains a run, finished or not."""
    return (folder / CONFIG).is_file()


def check_run(folder: Path) -> None:
    """Raise `LightPeftError` if a folder contains no run."""
    require(is_run(folder), f"{folder} is not the folder of a run: it has no {CONFIG}; give the --output of a run")


def stored_settings(folder: Path) -> dict[str, Any]:
    """Return the nested settings in a run folder's config.yaml, without those that allow foreign code (`SWITCHES`).

    Raises:
        LightPeftError: the file is missing or was altered.
    """
    file = folder / CONFIG
    text = read_text(file)
    settings = parse_yaml(text, file)
    require(text == _signed(text.rpartition(_SIGNATURE)[0]), f"{file} was altered or damaged; restore it")
    require(isinstance(settings, dict), f"{file} must hold a mapping of settings")
    model = settings.get("model")
    if isinstance(model, dict):
        settings["model"] = {name: value for name, value in model.items() if name not in SWITCHES}
    return settings


def stored_config(folder: Path) -> RunConfig:
    """Return the config in a run folder, without settings that allow foreign code (`SWITCHES`)."""
    return run_config_from_dict(stored_settings(folder))


def to_yaml(config: RunConfig) -> str:
    """Return a config as YAML, which `load_config` can read."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def signed_yaml(config: RunConfig) -> str:
    """Return a config as the text of config.yaml: YAML with its checksum in the last line."""
    return _signed(to_yaml(config))


def _signed(text: str) -> str:
    return f"{text}{_SIGNATURE}{hashlib.sha256(text.encode()).hexdigest()}\n"


def differences(stored: RunConfig, given: RunConfig, skip_budget: bool = False) -> list[str]:
    """Return the dotted names of settings that differ.

    `output`, settings that the method does not use and, with `skip_budget`, the budget are ignored.
    """
    budget = {f"light.{name}" for name in READ_BY_PLANS} if skip_budget else set()
    stored, given = _without_other_tasks(stored), _without_other_tasks(given)
    skipped = budget | {"output", "light.preset"} | {f"model.{name}" for name in SWITCHES}
    before, after = flat(dataclasses.asdict(stored)), flat(dataclasses.asdict(given))
    return [
        name
        for name in after | before
        if name not in skipped and before.get(name) != after.get(name) and not name.startswith(given.unused)
    ]


def _without_other_tasks(config: RunConfig) -> RunConfig:
    """Return the config without the user's tasks that the run does not use."""
    return dataclasses.replace(config, tasks={n: entry for n, entry in config.tasks.items() if n == config.data.task})


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as dotted name -> value."""
    result: dict[str, Any] = {}
    for key, value in data.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result
