"""The folder of a run: where each stage leaves its result, and whether it has."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightpeft.config import READ_BY_PLANS, SWITCHES, RunConfig, run_config_from_dict
from lightpeft.config.validation import from_dict, parse_yaml
from lightpeft.console.progress import exact_duration, in_bytes, print_line
from lightpeft.errors import LightPeftError, require
from lightpeft.files import (
    append_line,
    check_free,
    clean,
    explain_content_errors,
    is_own_file,
    lock_folder,
    read_json,
    read_text,
    write_text,
)
from lightpeft.machine import processes
from lightpeft.saving.adapter_files import DESCRIPTION
from lightpeft.saving.peft_adapter import ADAPTER_CONFIG
from lightpeft.training.checkpoints import last_checkpoint

CONFIG = "config.yaml"
_RESULTS = (
    "metrics.json",
    "bench.json",
    "adapter",
    "full",
    "model",
    "task.json",
    "pruned",
    "plan.json",
    "budget.json",
    "depth.json",
    "curve.json",
    "estimation",
    "teacher",
    "checkpoints",
    "log.jsonl",
    "report.html",
)
"""All that a run leaves in its folder beside its config; later results first."""


@dataclass(frozen=True)
class RunFolder:
    """One run on disk. A stage is done when its result is there; every result appears whole or not at all."""

    path: Path
    config: RunConfig
    replan: bool = False
    """Whether the budget may be another one than that of the folder, as long as nothing was pruned by that one."""

    @classmethod
    def open(cls, config: RunConfig, replan: bool = False, overwrite: bool = False) -> RunFolder:
        """The run of `config` in its output folder, new or to be resumed; nothing is written before `begin`.

        Args:
            replan: accept another budget than the folder's, as long as nothing was pruned by that one.
            overwrite: accept the run of another config, to be removed by `start_anew`.

        Raises:
            LightPeftError: the folder holds something else, or the run of another config.
        """
        run = cls(Path(config.output), config, replan)
        require(not run.path.exists() or run.path.is_dir(), f"output {run.path} is a file; give a folder")
        if processes().is_main_process:
            check_free(run.path)
        if overwrite:
            run._differing()  # which refuses what is no run
        else:
            run._check_same()
        return run

    @classmethod
    def at(cls, folder: Path) -> RunFolder:
        """The run that is in a folder, with the config that is there.

        Raises:
            LightPeftError: there is none, or its config is not as it was written.
        """
        return cls(folder, stored_config(folder))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block no other process works in the folder, which is there with its config in it.

        To be entered when all input has been found good. What killed processes left half-written is removed. Of several
        processes of one run the main one holds it.

        Raises:
            LightPeftError: another process holds the folder or has made it the run of another config, or it cannot be
                written.
        """
        state = processes()
        with lock_folder(self.path) if state.is_main_process else nullcontext():
            if state.is_main_process:
                clean(self.path)
                self._write_config()
            state.wait_for_everyone()
            yield

    def begin(self) -> None:
        """Make the folder and store the config in it, and no more.

        Raises:
            LightPeftError: as `held`.
        """
        with self.held():
            pass

    def _check_same(self) -> None:
        """Refuse a folder that holds something else, or the run of another config."""
        differing = self._differing()
        require(
            not differing,
            f"output {self.path} is the run of another config (it differs in {', '.join(differing)}); give another "
            "output, the same settings to go on, or run --overwrite to begin anew",
        )

    @property
    def goes_on(self) -> bool:
        """Whether what lies in the folder, if anything does, is of a run of this config."""
        return not self._differing()

    def _differing(self) -> list[str]:
        """Names of settings in which the folder is the run of another config; refuses what is no run."""
        if not (self.path / CONFIG).exists():
            empty = not self.path.is_dir() or all(map(is_own_file, self.path.iterdir()))
            require(empty, f"output {self.path} is not empty and not a run; give a new folder")
            return []
        try:
            stored = stored_config(self.path)
        except LightPeftError as error:
            raise LightPeftError(f"output {self.path} is not a run, or its {CONFIG} was edited: {error}") from error
        return differences(stored, self.config, skip_budget=self.replan and not self.has("prune"))

    def start_anew(self) -> None:
        """Remove the results of a run of another config, and no other file; that of the same config goes on.

        Raises:
            LightPeftError: another process holds the folder, or it is not the folder of a run.
        """
        state = processes()
        if state.is_main_process and self._differing():
            with lock_folder(self.path):
                if self._differing():  # still: somebody may have been here since
                    for name in _RESULTS:
                        _remove(self.path / name)
                    write_text(self.path / CONFIG, _signed(to_yaml(self.config)))
        state.wait_for_everyone()

    def _write_config(self) -> None:
        self._check_same()  # once more: somebody may have been here since
        file, text = self.path / CONFIG, _signed(to_yaml(self.config))
        if not file.exists() or read_text(file) != text:
            write_text(file, text)

    @property
    def estimation(self) -> Path:
        """Scores, and in `adapter/` the PEFT weights at the end of the stage."""
        return self.path / "estimation"

    @property
    def plan(self) -> Path:
        """Which units stay."""
        return self.path / "plan.json"

    @property
    def budget(self) -> Path:
        """What `light: auto` found, and what that is expected to cost."""
        return self.path / "budget.json"

    @property
    def curve(self) -> Path:
        """What each budget would cost; a plot of the same name beside it."""
        return self.path / "curve.json"

    @property
    def pruned(self) -> Path:
        """The light adapter before fine-tuning."""
        return self.path / "pruned"

    @property
    def adapter(self) -> Path:
        """What training leaves: a light adapter (method light) or a PEFT adapter (method plain)."""
        return self.path / "adapter"

    @property
    def full(self) -> Path:
        """What a light run has learned, as a PEFT adapter over the whole base, where the run keeps it so."""
        return self.path / "full"

    @property
    def keeps_full(self) -> bool:
        """Whether the run is one that leaves that."""
        return self.config.way.prunes and self.config.light.after.keep != "light"

    @property
    def last_training(self) -> str:
        """The stage that leaves what the run is asked by."""
        return "widen" if self.keeps_full else "train"

    @property
    def model(self) -> Path:
        """The result of method full: a transformers model with its tokenizer."""
        return self.path / "model"

    @property
    def task(self) -> Path:
        """What the task is, by which results are asked; in runs of method light the adapter says it."""
        return self.path / "task.json"

    @property
    def result(self) -> Path:
        """What the run is asked by: what training leaves or, if nothing else is kept, that at full width."""
        return self.full if self.keeps_full and self.config.light.after.keep == "full" else self.trained

    @property
    def trained(self) -> Path:
        """What training leaves, by the run's method."""
        return self.path / self.config.way.result

    @property
    def metrics(self) -> Path:
        """What was measured of the result."""
        return self.path / "metrics.json"

    @property
    def log(self) -> Path:
        """Losses and stage times, one JSON object a line."""
        return self.path / "log.jsonl"

    @property
    def teacher(self) -> Path:
        """What the teacher gives the training rows."""
        return self.path / "teacher"

    @property
    def depth(self) -> Path:
        """What `light.remove.depth: auto` found."""
        return self.path / "depth.json"

    def checkpoints(self, stage: str) -> Path:
        """Where a stage's trainer checkpoints go while it runs."""
        return self.path / "checkpoints" / stage

    def last_checkpoint(self, stage: str) -> Path | None:
        """The newest checkpoint of a stage that is as it was written; damaged ones are named and removed."""
        return last_checkpoint(self.checkpoints(stage), lambda line: self.announce(stage, line))

    def has(self, stage: str) -> bool:
        """Whether a stage has left its result: "teach", "depth", "estimate", "budget", "plan", "prune", "train",
        "widen" or "evaluate"."""
        result = {
            "teach": self.teacher / "teacher.json",
            "depth": self.depth,
            "estimate": self.estimation / "estimation.json",
            "budget": self.budget,
            "plan": self.plan,
            "prune": self.pruned / DESCRIPTION,
            "train": self.trained / self.config.way.last_file,
            "widen": self.full / ADAPTER_CONFIG,
            "evaluate": self.metrics,
        }
        return result[stage].is_file()

    def need(self, stage: str, verb: str) -> None:
        """Require that an earlier stage has run before `verb`.

        Raises:
            LightPeftError: it has not.
        """
        command = "train" if stage == "widen" else stage  # which ends with that
        require(self.has(stage), f"{self.path} has no result of `lightpeft {command}` yet; run that before {verb}")

    def finish_stage(self, stage: str, seconds: float, save: Callable[[], None], **facts: Any) -> None:
        """Save a stage's result, note its time, say so, and drop its checkpoints, which nobody will resume from.

        Of several processes the main one does it, and the others wait.
        """
        state = processes()
        if state.is_main_process:
            save()
            self._note(stage, seconds, facts)
            print_line(f"{stage}: done in {', '.join(_cost(seconds, facts))}")
        state.wait_for_everyone()

    def _note(self, stage: str, seconds: float, facts: dict[str, Any]) -> None:
        append_line(self.log, {"stage": stage, "seconds": round(seconds, 3), "done": True, **facts})
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)  # also those of a run that was killed right here

    def announce(self, stage: str, line: str) -> None:
        """Say something worth knowing before a stage begins, on stderr and in the log."""
        if processes().is_main_process:
            append_line(self.log, {"stage": stage, "note": line})
            print_line(line)

    def stage_seconds(self) -> dict[str, float]:
        """Seconds of each finished stage, from the log; a stage that was resumed counts its last part."""
        return {stage: entry.get("seconds", 0.0) for stage, entry in self.finished_stages().items()}

    def finished_stages(self) -> dict[str, dict[str, Any]]:
        """What the log says of each finished stage."""
        done = [entry for entry in self.log_entries() if entry.get("done") and isinstance(entry.get("stage"), str)]
        return {entry["stage"]: entry for entry in done}

    def log_entries(self) -> Iterable[dict[str, Any]]:
        """The entries of log.jsonl; a line that a killed run left half-written is skipped."""
        if not self.log.is_file():
            return
        for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict):
                yield entry


def _cost(seconds: float, facts: Mapping[str, Any]) -> Iterator[str]:
    """What a stage took, in words, as far as it is known."""
    yield exact_duration(seconds)
    if facts.get("steps"):
        yield f"{facts['steps']:,} steps"
    if facts.get("samples_per_second"):
        yield f"{facts['samples_per_second']:,.0f} rows/s"
    if facts.get("peak_memory_bytes"):
        yield f"{in_bytes(facts['peak_memory_bytes'])} at the peak"


def is_run(folder: Path) -> bool:
    """Whether a folder is one of a run, however far it has come."""
    return (folder / CONFIG).is_file()


def _remove(path: Path) -> None:
    """Remove a file or a folder; of a link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good a model is."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float] | None]


@dataclass(frozen=True, kw_only=True)
class Probe(Quality):
    """How good a linear probe of the untouched base is."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class Milestones:
    """What a run was worth on its way."""

    examples: int
    metrics: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What people and tables read of a metrics.json."""

    method: str
    metrics: dict[str, float]
    parameters: dict[str, int | float]
    intervals: dict[str, tuple[float, float] | None] = dataclasses.field(default_factory=dict)
    main_metric: str = ""
    """Which of `metrics` the task is about; older runs have not said so."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    training: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    adapter_bytes: int | None = None
    full_width: Quality | None = None
    linear_probe: Probe | None = None
    milestones: Milestones | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)
    hardware: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, report: dict[str, Any]) -> Report:
        """That of the content of a metrics.json, in which there may be more.

        Raises:
            LightPeftError: something is missing or of another type.
        """
        names = [each.name for each in dataclasses.fields(cls) if each.name in report]
        return from_dict(cls, {name: report[name] for name in names})


def read_report(path: Path) -> dict[str, Any]:
    """What `metrics.json` says.

    Raises:
        LightPeftError: it is missing or damaged, or says something else.
    """
    report = read_json(path)
    with explain_content_errors(path):
        Report.of(report)
    return report


def stored_settings(folder: Path) -> dict[str, Any]:
    """The settings in a run folder's config.yaml, nested; what would let code in (`SWITCHES`) is not among them.

    Raises:
        LightPeftError: it is not there, or not as it was written.
    """
    file = folder / CONFIG
    text = read_text(file)
    settings = parse_yaml(text, file)
    require(text == _signed(text.rpartition(_SIGNATURE)[0]), f"{file} was altered or damaged")
    require(isinstance(settings, dict), f"{file} must hold a mapping of settings")
    model = settings.get("model")
    if isinstance(model, dict):
        settings["model"] = {name: value for name, value in model.items() if name not in SWITCHES}
    return settings


def stored_config(folder: Path) -> RunConfig:
    """The same as a config."""
    return run_config_from_dict(stored_settings(folder))


_SIGNATURE = "# sha256 of what is above: "
"""Begins the last line of config.yaml: a config that lost its end would be that of another run."""


def _signed(text: str) -> str:
    return f"{text}{_SIGNATURE}{hashlib.sha256(text.encode()).hexdigest()}\n"


def to_yaml(config: RunConfig) -> str:
    """A config as YAML that `load_config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def differences(stored: RunConfig, given: RunConfig, skip_budget: bool = False) -> list[str]:
    """Dotted names of settings that differ; `output` and what the method has no use for do not count, nor the budget if
    `skip_budget`."""
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
    """The config without the user's tasks that the run has nothing to do with."""
    return dataclasses.replace(config, tasks={n: entry for n, entry in config.tasks.items() if n == config.data.task})


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    result: dict[str, Any] = {}
    for key, value in data.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result
