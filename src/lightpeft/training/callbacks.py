"""What watches a trainer: a bar, lines of a log, seals of checkpoints, and signals that end it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lightpeft.console.progress import Pulse
from lightpeft.files import append_line, seal
from lightpeft.machine import processes


class SealCheckpoint(TrainerCallback):
    """Seals a checkpoint when everything in it is written: a run that was killed while saving skips it."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        processes().wait_for_everyone()  # each writes its random state
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class LogLines(TrainerCallback):
    """Appends what the trainer logs to the run's log.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path, self.stage, self._before, self._begun = path, "train", "train", 0

    def begin(self, stage: str, step: int) -> None:
        """A stage begins behind a step, which is still to be logged as one of the stage before."""
        self._before, self.stage, self._begun = self.stage, stage, step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        told = any(name == "loss" or name.startswith(("eval_", "light/")) for name in logs or ())
        if state.is_world_process_zero and told:
            stage = self.stage if state.global_step > self._begun else self._before
            append_line(self.path, {"stage": stage, "step": state.global_step, **(logs or {})})


class ProgressBar(TrainerCallback):
    """A rich progress bar with loss, step count, elapsed and remaining time; no terminal, no bar, but lines like it."""

    def __init__(self, total: int) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("train", total=total, loss="")
        self._total, self._loss = total, ""
        self._pulse = Pulse("train", total, "step")

    def begin(self, stage: str, step: int) -> None:
        """A stage begins behind a step."""
        self.progress.update(self.task, description=stage)
        self._pulse = Pulse(stage, self._total, "step", done=step)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)
        if self.progress.disable and state.is_world_process_zero:
            self._pulse.beat(state.global_step, self._loss)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._loss = f"loss {float(logs['loss']):.4f}"
            self.progress.update(self.task, loss=self._loss)

    def end_at(self, step: int) -> None:
        """The stage is over, perhaps after fewer steps than it might have taken."""
        self.progress.update(self.task, total=step, completed=step)


class StopOnSignal(TrainerCallback):
    """SIGINT and SIGTERM end training after the step under way, with a checkpoint; a second signal ends it at once.

    A stage that is over gets no checkpoint: what it leaves is its result, and nothing is to be trained from there.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block (in the main thread; elsewhere they cannot be handled)."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True

        try:
            before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_training_stop:
            control.should_save &= args.load_best_model_at_end  # its last model may be the best
        elif self.requested:
            control.should_save = True
            control.should_training_stop = True
