"""Callbacks of a trainer: a progress bar, log lines, seals of checkpoints, and signals that stop it."""

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

from lightpeft.console.progress import Pulse, print_line
from lightpeft.files import append_line, seal
from lightpeft.machine import processes


class SealCheckpoint(TrainerCallback):
    """Seal a checkpoint when everything in it is written; resuming skips checkpoints without a seal."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        processes().wait_for_everyone()  # each writes its random state
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class LogLines(TrainerCallback):
    """Append the trainer's logs to the run's log.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path, self.stage, self._before, self._begun = path, "train", "train", 0

    def begin(self, stage: str, step: int) -> None:
        """Begin a stage after a step, which itself is still logged under the previous stage."""
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
    """A rich progress bar with loss, step count, elapsed and remaining time; without a terminal, lines of text."""

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
        """Begin a stage after a step."""
        self.progress.update(self.task, description=stage)
        self._pulse = Pulse(stage, self._total, "step", done=step)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            if state.global_step:
                print_line(f"train: continues from step {state.global_step}")
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
        """Show the bar as complete: training may end after fewer steps than planned."""
        self.progress.update(self.task, total=step, completed=step)


class StopOnSignal(TrainerCallback):
    """Stop training on SIGINT or SIGTERM after the current step, with a checkpoint; a second signal stops it at once.

    Training that ends with this step writes no checkpoint: it writes its result.
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
