"""The teacher of a run: a finished model whose logits of the training rows are computed once, before training."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from lightpeft.app.evaluation.class_names import class_order, join_names
from lightpeft.app.evaluation.overlap import rows_seen_by
from lightpeft.app.evaluation.respondent import BatchedModel
from lightpeft.app.folders.forms import Found, Wanted, WholeModel
from lightpeft.app.folders.opening import find_model
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.respondent import row_logits
from lightpeft.app.tasks.tokens import check_tokens
from lightpeft.config import SWITCHES, RunConfig
from lightpeft.errors import LightPeftError, require
from lightpeft.files import (
    CHECKSUMS,
    check_sealed,
    file_checksum,
    read_json,
    read_tensors,
    replacing_folder,
    seal,
    write_json,
    write_tensors,
)
from lightpeft.machine import accelerator, preserve_random_state
from lightpeft.models.families.family_table import max_positions
from lightpeft.models.task_heads import CLASSIFICATION, MULTIPLE_CHOICE, REGRESSION, TaskHead
from lightpeft.models.tokenizers import check_vocabulary
from lightpeft.training.teacher_logits import OutputKind, one_class_warning, split_over_processes, with_teacher_logits

TEACHABLE = (CLASSIFICATION, REGRESSION, MULTIPLE_CHOICE)
"""Task heads whose logits a student can learn."""
_LOGITS, _FACTS = "logits.safetensors", "teacher.json"


def check_teachable(config: RunConfig, task: Task) -> None:
    """Raise `LightPeftError` if a run asks for a teacher, and its task has no logits to learn."""
    told = f"training.teacher: task {config.data.task} (head {task.head}) gives no logits to learn"
    kinds = "leave it out; classification, regression and multiple choice with a head"
    teachable = config.training.teacher is None or task.head in TEACHABLE
    require(teachable, f"{told}; {kinds} can have a teacher")


@dataclass(frozen=True)
class RunTeacher:
    """A teacher that passed the checks of a run; its weights are not loaded yet."""

    found: Found
    task: Task
    """The run's task with the teacher's `max_length`."""
    rows: Dataset
    """Training rows of the run, as text, in the columns of the task's kind."""

    @classmethod
    def of(cls, config: RunConfig, task: Task, rows: Dataset) -> RunTeacher | None:
        """Find and check the teacher of a run; None: `training.teacher` is not set.

        Args:
            rows: training rows as text, in the columns of the task's kind.

        Raises:
            LightPeftError: no such model exists, or it was trained for another task or other labels.
        """
        name = config.training.teacher
        if name is None:
            return None
        switches = {name: getattr(config.model, name) for name in SWITCHES}
        try:
            found = find_model(name, None, switches)
            found.check(Wanted.of(task))
            _check_architecture(found, task)
            _check_labels(found, task)
        except LightPeftError as error:
            raise LightPeftError(f"training.teacher: {error}") from error
        limits = (found.facts.get("max_length", task.config.max_length), max_positions(found.config))
        shorter = replace(task.config, max_length=min(limit for limit in limits if limit))
        return cls(found, replace(task, config=shorter), rows)

    def add_logits(self, run: RunFolder, rows: Dataset, batch_size: int) -> Dataset:
        """Add the teacher's logits to the encoded training rows: those in the run folder or, if it has none, new ones.

        Args:
            batch_size: rows per forward pass of the teacher.

        Raises:
            LightPeftError: the teacher cannot be loaded, or its logits are NaN or infinite; nothing is written then.
        """
        fingerprint = self._fingerprint()
        logits = _read_logits(run, fingerprint)
        if logits is not None:
            return with_teacher_logits(rows, logits)
        started = time.perf_counter()
        try:
            with preserve_random_state(accelerator() or torch.device("cpu")):
                logits = self._compute_logits(batch_size)
            taught = with_teacher_logits(rows, logits)
        except LightPeftError as error:
            raise LightPeftError(f"training.teacher: {error}") from error

        def save() -> None:
            _write_logits(run, fingerprint, logits)

        warnings = list(self._warnings(logits))
        with run.held():
            for line in warnings:
                run.announce("teach", f"warning: {line}")
            seconds, facts = time.perf_counter() - started, {"teacher": self.found.name, "rows": len(rows)}
            run.finish_stage("teach", seconds, save, **facts, warnings=warnings)
        return taught

    def _compute_logits(self, batch_size: int) -> list[Tensor]:
        """Compute the logits of each row, then free the teacher's memory; of multiple choice, one logit per option."""
        found, task = self.found, self.task
        tokenizer = found.tokenizer()
        check_vocabulary(tokenizer, found.config)
        encoded = task.encode_inputs(self.rows, tokenizer)
        check_tokens(encoded, found.config, "the training rows", tokenizer)
        model = found.open(Wanted.of(task))
        collator = task.collator(tokenizer, found.padding(task.config.max_length))
        respondent = BatchedModel(model, collator, batch_size, found.precision)

        def answer(numbers: Sequence[int]) -> list[Tensor]:
            part = encoded.select(numbers)
            logits = row_logits(respondent, part)
            if task.head != MULTIPLE_CHOICE:
                return logits
            return [of_row[: len(options)] for of_row, options in zip(logits, part["input_ids"], strict=True)]

        return split_over_processes(len(encoded), answer)

    def _warnings(self, logits: Sequence[Tensor]) -> Iterator[str]:
        """Yield a warning if the teacher has learned nothing, or knows test rows by heart."""
        kinds: dict[TaskHead, OutputKind] = {REGRESSION: "numbers", MULTIPLE_CHOICE: "options"}
        nothing = one_class_warning(logits, kinds.get(self.task.head, "classes"), self.task.labels)
        run, own = self.found.run, self.task.config
        # of a teacher with the run's own rows, the run's warning about its own training rows says the same
        same = run is not None and replace(run.data, max_length=own.max_length) == own
        seen = None if same else rows_seen_by(self.found, self.task, "training rows of the teacher")
        for line in (nothing, seen):
            if line is not None:
                yield f"training.teacher: {line}"

    def _fingerprint(self) -> str:
        """Return the SHA-256 of the teacher's files (or name), its `max_length` and the texts it reads."""
        found, task = self.found, self.task
        places = {str(getattr(found, "folder", found.model.name)), found.model.name}
        digest = hashlib.sha256(json.dumps([found.kind, found.model.revision, task.config.max_length]).encode())
        for place in sorted(places):
            files = sorted(path for path in Path(place).iterdir() if path.is_file()) if Path(place).is_dir() else []
            told: list[Any] = [(path.name, file_checksum(path)) for path in files] or [place]
            digest.update(json.dumps(told).encode())
        columns = [name for name in self.rows.column_names if name not in task.targets]
        for row in self.rows.select_columns(columns):
            digest.update(json.dumps(row, default=str, sort_keys=True).encode())
        return digest.hexdigest()


def _check_architecture(found: Found, task: Task) -> None:
    """Require that a plain transformers model, which records no task, has the head of the task."""
    if found.facts or not isinstance(found, WholeModel):
        return
    wanted = task.head.auto.__name__.removeprefix("AutoModel")
    own = ", ".join(found.config.architectures or ["no model with a head"])
    require(own.endswith(wanted), f"{found.name} is {own}; task {task.config.task} needs {wanted}; give such a model")


def _check_labels(found: Found, task: Task) -> None:
    """Require that the teacher has the classes of the task, in the same order."""
    if task.head.outputs != "classes" or found.class_names is None:
        return
    order = class_order(found.class_names, task.labels, found.name)
    both = f"{found.name} has the labels {join_names(order)}, and the data have {join_names(task.labels)}"
    require(order == task.labels, f"{both}; give a teacher of the same labels in the same order")


def _read_logits(run: RunFolder, fingerprint: str) -> list[Tensor] | None:
    """Read the logits of the teacher from the run folder; None: missing, damaged, or of another teacher or rows."""
    if not run.has("teach"):
        return None
    try:
        check_sealed(run.teacher)
        if read_json(run.teacher / _FACTS).get("fingerprint") != fingerprint:
            return None
        kept = read_tensors(run.teacher / _LOGITS)
    except LightPeftError:
        return None  # they are computed again
    return list(kept["logits"].split(kept["sizes"].tolist()))


def _write_logits(run: RunFolder, fingerprint: str, logits: Sequence[Tensor]) -> None:
    with replacing_folder(run.teacher, last=CHECKSUMS) as temporary:
        sizes = torch.tensor([len(of_row) for of_row in logits])
        write_tensors(temporary / _LOGITS, {"logits": torch.cat(list(logits)), "sizes": sizes})
        write_json(temporary / _FACTS, {"fingerprint": fingerprint})
        seal(temporary)
