"""The folder of a run: where each stage leaves its result, and whether it has."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightpeft.checkpoint import DESCRIPTION
from lightpeft.config import Budget, RunConfig, load_config
from lightpeft.errors import LightPeftError, require
from lightpeft.training import append_line

_CONFIG = "config.yaml"


@dataclass(frozen=True)
class RunFolder:
    """One run on disk. A stage is done when its result is there; every result appears whole or not at all."""

    path: Path
    config: RunConfig

    @classmethod
    def open(cls, config: RunConfig, replan: bool = False) -> RunFolder:
        """The run of `config` in its output folder, new or to be resumed.

        Args:
            replan: accept another budget than the folder's, and make it the folder's.

        Raises:
            LightPeftError: the folder holds something else, or the run of another config.
        """
        path = Path(config.output)
        require(not path.exists() or path.is_dir(), f"output {path} is a file; give a folder")
        if (path / _CONFIG).is_file():
            differing = _differences(load_config(path / _CONFIG), config, skip_budget=replan)
            if differing:
                raise LightPeftError(
                    f"output {path} is the run of another config (it differs in {', '.join(differing)}); "
                    "give another output, or the same settings to go on"
                )
        elif path.is_dir() and any(path.iterdir()):
            raise LightPeftError(f"output {path} is not empty and not a run; give a new folder")
        run = cls(path, config)
        run._write_config()
        return run

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """The run in a folder, with the config that is stored there.

        Raises:
            LightPeftError: the folder is not a run.
        """
        path = Path(path)
        require((path / _CONFIG).is_file(), f"{path} is not a run folder: it has no {_CONFIG}")
        return cls(path, dataclasses.replace(load_config(path / _CONFIG), output=str(path)))

    def _write_config(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            temporary = self.path / f".{_CONFIG}.{os.getpid()}.tmp"
            temporary.write_text(to_yaml(self.config), encoding="utf-8")
            temporary.replace(self.path / _CONFIG)
        except OSError as error:
            raise LightPeftError(f"cannot write to output {self.path}: {error.strerror or error}") from error

    @property
    def estimation(self) -> Path:
        """Scores, and in `adapter/` the PEFT weights at the end of the stage."""
        return self.path / "estimation"

    @property
    def plan(self) -> Path:
        """Which units stay."""
        return self.path / "plan.json"

    @property
    def pruned(self) -> Path:
        """The light adapter before fine-tuning."""
        return self.path / "pruned"

    @property
    def adapter(self) -> Path:
        """The result: a light adapter (method light) or a PEFT adapter (method lora)."""
        return self.path / "adapter"

    @property
    def metrics(self) -> Path:
        """What was measured of the result."""
        return self.path / "metrics.json"

    @property
    def log(self) -> Path:
        """Losses and stage times, one JSON object a line."""
        return self.path / "log.jsonl"

    def checkpoints(self, stage: str) -> Path:
        """Where a stage's trainer checkpoints go while it runs."""
        return self.path / "checkpoints" / stage

    def has(self, stage: str) -> bool:
        """Whether a stage ("estimate", "plan", "prune", "train", "evaluate") has left its result."""
        result = {
            "estimate": self.estimation / "estimation.json",
            "plan": self.plan,
            "prune": self.pruned / DESCRIPTION,
            "train": self.adapter / (DESCRIPTION if self.config.method == "light" else "adapter_config.json"),
            "evaluate": self.metrics,
        }
        return result[stage].is_file()

    def need(self, stage: str, verb: str) -> None:
        """Require that an earlier stage has run before `verb`.

        Raises:
            LightPeftError: it has not.
        """
        require(self.has(stage), f"{self.path} has no result of `lightpeft {stage}` yet; run that before {verb}")

    def finish_stage(self, stage: str, seconds: float, **facts: Any) -> None:
        """Note a stage's time, and drop its checkpoints, which nobody will resume from."""
        append_line(self.log, {"stage": stage, "seconds": round(seconds, 3), "done": True, **facts})
        shutil.rmtree(self.checkpoints(stage), ignore_errors=True)
        if (self.path / "checkpoints").is_dir() and not any((self.path / "checkpoints").iterdir()):
            (self.path / "checkpoints").rmdir()

    def stage_seconds(self) -> dict[str, float]:
        """Seconds of each finished stage, from the log; a stage that was resumed counts its last part."""
        return {entry["stage"]: entry["seconds"] for entry in self.log_entries() if entry.get("done")}

    def log_entries(self) -> Iterable[dict[str, Any]]:
        """The entries of log.jsonl; a line that a killed run left half-written is skipped."""
        if not self.log.is_file():
            return
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def to_yaml(config: RunConfig) -> str:
    """A config as YAML that `load_config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def _differences(stored: RunConfig, given: RunConfig, skip_budget: bool) -> list[str]:
    """Dotted names of settings that differ; `output` does not count, nor the budget if `skip_budget`."""
    budget = {f"light.{field.name}" for field in dataclasses.fields(Budget)} if skip_budget else set()
    skipped = budget | {"output", "preset"}
    before, after = _flat(dataclasses.asdict(stored)), _flat(dataclasses.asdict(given))
    return [name for name in after if name not in skipped and before.get(name) != after[name]]


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
