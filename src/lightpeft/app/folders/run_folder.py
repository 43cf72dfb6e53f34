"""The folder of a run: paths of the stages' results, and which stages are done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightpeft.app.folders.stored_config import CONFIG, differences, signed_yaml, stored_config
from lightpeft.config import READ_BY_PLANS, RunConfig
from lightpeft.console.progress import exact_duration, in_bytes, print_line
from lightpeft.errors import LightPeftError, require
from lightpeft.files import append_line, check_free, clean, is_own_file, lock_folder, read_text, write_text
from lightpeft.machine import processes
from lightpeft.plans.estimation_record import RECORD
from lightpeft.saving.adapter_files import DESCRIPTION
from lightpeft.saving.peft_adapter import ADAPTER_CONFIG
from lightpeft.training.checkpoints import last_checkpoint

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
    "comparison.html",
    "tensorboard",
)
"""All files and folders of a run except its config; later results first."""


@dataclass(frozen=True)
class RunFolder:
    """One run on disk. A stage is done when its result exists; every result appears completely or not at all."""

    path: Path
    config: RunConfig
    replan: bool = False
    """True to accept another budget than the folder's, as long as nothing was pruned."""
    asked: RunConfig | None = None
    """Settings as given, which config.yaml holds, if `config` has others in their place; None: `config`."""

    @classmethod
    def open(
        cls, config: RunConfig, replan: bool = False, overwrite: bool = False, asked: RunConfig | None = None
    ) -> RunFolder:
        """Return the run of `config` in its output folder, new or to be resumed; `begin` writes the first file.

        Args:
            replan: True to accept another budget than the folder's, as long as nothing was pruned.
            overwrite: True to accept the run of another config, which `start_anew` removes.
            asked: the settings as given, if `config` has others in their place.

        Raises:
            LightPeftError: the folder contains other files, or the run of another config.
        """
        run = cls(Path(config.output), config, replan, asked)
        require(not run.path.exists() or run.path.is_dir(), f"output {run.path} is a file; give a folder")
        if processes().is_main_process:
            check_free(run.path)
        if overwrite:
            run._changed_settings()  # raises if the folder is not a run
        else:
            run._check_same()
        return run

    @classmethod
    def at(cls, folder: Path) -> RunFolder:
        """Return the run in a folder, with its stored config.

        Raises:
            LightPeftError: the folder has no run, or its config was altered.
        """
        return cls(folder, stored_config(folder))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the folder inside the block, after it was created with its config.

        Enter it after all input checks. Partial files of killed processes are removed. With several processes per run,
        the main one holds the lock.

        Raises:
            LightPeftError: another process holds the folder or made it the run of another config, or it cannot be
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
        """Create the folder and store the config in it.

        Raises:
            LightPeftError: another process holds the folder or made it the run of another config, or it cannot be
                written.
        """
        with self.held():
            pass

    def _check_same(self) -> None:
        """Raise `LightPeftError` if the folder contains other files, or the run of another config."""
        differing = self._changed_settings()
        planned = {f"light.{name}" for name in READ_BY_PLANS}
        reusable = self.has("estimate") and planned.issuperset(differing)
        reuse = f" (with --estimation {self.path} to use its scores)" if reusable else ""
        require(
            not differing,
            f"output {self.path} holds a run with other settings (it differs in {', '.join(differing)}); give another "
            f"output{reuse}, the same settings to resume, or --overwrite to start again",
        )

    @property
    def has_same_config(self) -> bool:
        """True if the folder is new, or its run has the same config."""
        return not self._changed_settings()

    def _changed_settings(self) -> list[str]:
        """Return the settings that differ from the folder's config; raise `LightPeftError` if it is not a run."""
        if not (self.path / CONFIG).exists():
            empty = not self.path.is_dir() or all(map(is_own_file, self.path.iterdir()))
            require(empty, f"output {self.path} contains files but no run; give a new folder")
            return []
        try:
            stored = stored_config(self.path)
        except LightPeftError as error:
            raise LightPeftError(
                f"output {self.path} is not a run, or its {CONFIG} was edited ({error}); give a new folder"
            ) from error
        return differences(stored, self._as_given, skip_budget=self.replan and not self.has("prune"))

    def start_anew(self) -> None:
        """Remove the results of a run of another config, and no other file; a run of the same config is kept.

        Raises:
            LightPeftError: another process holds the folder, or the folder is not a run.
        """
        state = processes()
        if state.is_main_process and self._changed_settings():
            with lock_folder(self.path):
                if self._changed_settings():  # again: another process may have changed it
                    for name in _RESULTS:
                        _remove(self.path / name)
                    write_text(self.path / CONFIG, signed_yaml(self._as_given))
        state.wait_for_everyone()

    def _write_config(self) -> None:
        self._check_same()  # again: another process may have changed it
        file, text = self.path / CONFIG, signed_yaml(self._as_given)
        if not file.exists() or read_text(file) != text:
            write_text(file, text)

    @property
    def _as_given(self) -> RunConfig:
        return self.config if self.asked is None else self.asked

    @property
    def estimation(self) -> Path:
        """Folder of estimation: scores, and in `adapter/` the PEFT weights at its end."""
        return self.path / "estimation"

    @property
    def plan(self) -> Path:
        """File with the plan: the units that stay."""
        return self.path / "plan.json"

    @property
    def budget(self) -> Path:
        """File with the budget that `light: auto` found, and its expected cost."""
        return self.path / "budget.json"

    @property
    def curve(self) -> Path:
        """File with the expected cost of each budget."""
        return self.path / "curve.json"

    @property
    def pruned(self) -> Path:
        """Folder of the light adapter before fine-tuning."""
        return self.path / "pruned"

    @property
    def adapter(self) -> Path:
        """Folder of the trained light adapter (method light) or PEFT adapter (method plain)."""
        return self.path / "adapter"

    @property
    def full(self) -> Path:
        """Folder of a light run's full-width PEFT adapter, if the run keeps one."""
        return self.path / "full"

    @property
    def keeps_full(self) -> bool:
        """True if the run leaves a full-width PEFT adapter (`full`)."""
        return self.config.method_spec.prunes and self.config.light.after.keep != "light"

    @property
    def last_training(self) -> str:
        """Last stage that trains: "widen" if the run keeps a full-width adapter, else "train"."""
        return "widen" if self.keeps_full else "train"

    @property
    def model(self) -> Path:
        """Folder of the result of method full: a transformers model with its tokenizer."""
        return self.path / "model"

    @property
    def task(self) -> Path:
        """File with the task's facts, for results other than light adapters, which contain them."""
        return self.path / "task.json"

    @property
    def result(self) -> Path:
        """Folder of the model that answers for the run: the full-width adapter if only that is kept, else `trained`."""
        return self.full if self.keeps_full and self.config.light.after.keep == "full" else self.trained

    @property
    def trained(self) -> Path:
        """Folder of the model that training leaves, by the run's method."""
        return self.path / self.config.method_spec.result

    @property
    def metrics(self) -> Path:
        """File with metrics and facts of the result."""
        return self.path / "metrics.json"

    @property
    def log(self) -> Path:
        """File with losses and stage times, one JSON object per line."""
        return self.path / "log.jsonl"

    @property
    def teacher(self) -> Path:
        """Folder with the teacher's outputs for the training rows."""
        return self.path / "teacher"

    @property
    def depth(self) -> Path:
        """File with the depth that `light.remove.depth: auto` found."""
        return self.path / "depth.json"

    def checkpoints(self, stage: str) -> Path:
        """Return the folder of a stage's checkpoints, which exists while the stage runs."""
        return self.path / "checkpoints" / stage

    def last_checkpoint(self, stage: str) -> Path | None:
        """Return the newest intact checkpoint of a stage, or None; damaged ones are announced and removed."""
        return last_checkpoint(self.checkpoints(stage), lambda line: self.announce(stage, line))

    def has(self, stage: str) -> bool:
        """Return True if a stage is done.

        Args:
            stage: "teach", "depth", "estimate", "budget", "plan", "prune", "train", "widen" or "evaluate".
        """
        result = {
            "teach": self.teacher / "teacher.json",
            "depth": self.depth,
            "estimate": self.estimation / RECORD,
            "budget": self.budget,
            "plan": self.plan,
            "prune": self.pruned / DESCRIPTION,
            "train": self.trained / self.config.method_spec.last_file,
            "widen": self.full / ADAPTER_CONFIG,
            "evaluate": self.metrics,
        }
        return result[stage].is_file()

    def need(self, stage: str, verb: str) -> None:
        """Check that an earlier stage is done.

        Args:
            stage: the stage that must be done.
            verb: command that needs it, for the error message.

        Raises:
            LightPeftError: the stage is not done.
        """
        command = "train" if stage == "widen" else stage  # train includes widen
        require(self.has(stage), f"{self.path} has no result of `lightpeft {command}` yet; run that before {verb}")

    def finish_stage(self, stage: str, seconds: float, save: Callable[[], None], **facts: Any) -> None:
        """Save a stage's result, log and print its time, and delete its checkpoints, which are no longer needed.

        With several processes, the main one does this, and the others wait.

        Args:
            save: writes the result.
            facts: further values for the log entry.
        """
        state = processes()
        if state.is_main_process:
            save()
            self._log_stage(stage, seconds, facts)
            print_line(f"{stage}: done in {', '.join(_describe_cost(seconds, facts))}")
        state.wait_for_everyone()

    def _log_stage(self, stage: str, seconds: float, facts: dict[str, Any]) -> None:
        append_line(self.log, {"stage": stage, "seconds": round(seconds, 3), "done": True, **facts})
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)  # also those left by a run that was killed here

    def announce(self, stage: str, line: str) -> None:
        """Print a line about a stage on stderr, and add it to the log."""
        if processes().is_main_process:
            append_line(self.log, {"stage": stage, "note": line})
            print_line(line)

    def stage_seconds(self) -> dict[str, float]:
        """Return the seconds of each finished stage, from the log; for a resumed stage, those after the last resume."""
        return {stage: entry.get("seconds", 0.0) for stage, entry in self.finished_stages().items()}

    def finished_stages(self) -> dict[str, dict[str, Any]]:
        """Return the log entry of each finished stage."""
        done = [entry for entry in self.log_entries() if entry.get("done") and isinstance(entry.get("stage"), str)]
        return {entry["stage"]: entry for entry in done}

    def log_entries(self) -> Iterable[dict[str, Any]]:
        """Yield the entries of log.jsonl; a partial line of a killed run is skipped."""
        if not self.log.is_file():
            return
        for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict):
                yield entry


def _describe_cost(seconds: float, facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the known costs of a stage as text: time, steps, speed, memory."""
    yield exact_duration(seconds)
    if facts.get("steps"):
        yield f"{facts['steps']:,} steps"
    if facts.get("samples_per_second"):
        yield f"{facts['samples_per_second']:,.0f} rows/s"
    if facts.get("peak_memory_bytes"):
        yield f"peak memory {in_bytes(facts['peak_memory_bytes'])}"


def _remove(path: Path) -> None:
    """Remove a file, a folder, or a link (not its target)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
