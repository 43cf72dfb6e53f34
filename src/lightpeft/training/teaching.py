"""Knowledge distillation: the loss of a trainer whose training rows have a teacher's logits beside their labels.

The loss is `(1 - w) * own + w * T**2 * KL(teacher || student)`, both at the temperature T; for regression, the squared
difference replaces the divergence. (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from lightpeft.compat.torch import ReadRecorder
from lightpeft.errors import LightPeftError, require
from lightpeft.models.batches import IGNORED, TEACHER_LOGITS
from lightpeft.models.unwrap import transformers_model
from lightpeft.training.host import Host
from lightpeft.training.teacher_logits import OutputKind, has_teacher_logits, output_kind_of

WEIGHT = 0.5
"""Default weight of the teacher's loss in the total loss."""
TEMPERATURES: dict[OutputKind, float] = {"classes": 2.0, "options": 2.0, "tokens": 1.0}
"""Temperature T, which divides the logits of student and teacher. Measured on held-out rows: on CoLA 2 is as good as 1;
on WNUT-17 (entities) 2 costs 4 to 5 points of F1 against 1. (configs/frontier/predictions.txt)"""


class Teaching:
    """Distillation in a trainer whose training rows have a teacher's logits; does nothing in any other.

    Attributes:
        weight: weight of the teacher's loss in the total loss.
    """

    def __init__(self, trainer: Host) -> None:
        self.weight = WEIGHT
        self._trainer = trainer

    def check(self, *, plain: bool) -> None:
        """Refuse logits that do not fit the trainer's model.

        Args:
            plain: True if the trainer's loss is `Trainer`'s own.

        Raises:
            LightPeftError: the trainer has a loss of its own, or a row's logits are missing, not finite, or of another
                shape.
        """
        rows = self._trainer.train_dataset
        if not has_teacher_logits(rows):
            return
        what = type(self._trainer).__name__
        require(plain, f"teacher: {what} has a loss of its own, which ignores a teacher; leave the teacher out")
        output_kind, model = output_kind_of(self._trainer.model, rows), transformers_model(self._trainer.model)
        count = None if output_kind == "options" else model.config.num_labels
        of_rows = rows.with_format(None)[TEACHER_LOGITS][:]
        for number, of_row in enumerate(of_rows, 1):
            where = f"row {number} of the training rows: {TEACHER_LOGITS}"
            given = np.asarray(np.nan if of_row is None else of_row, dtype=np.float32)
            require(bool(np.isfinite(given).all()), f"{where} is empty, or contains NaN or infinity; correct the row")
            given = given.reshape(1) if output_kind == "numbers" and not given.ndim else given
            fits = given.ndim == (2 if output_kind == "tokens" else 1) and count in (None, given.shape[-1])
            shape = {"tokens": f"[tokens, {count}]", "options": "[options]"}.get(output_kind, f"[{count}]")
            require(fits, f"{where} has shape {list(given.shape)}, and {type(model).__name__} needs {shape}")

    @contextmanager
    def batching(self, *, training: bool) -> Iterator[None]:
        """Inside the block, let the trainer collate rows that have the teacher's logits.

        Args:
            training: True: batches have the logits, too; False: they are dropped, for evaluation.
        """
        trainer, own = self._trainer, self._trainer.data_collator
        if has_teacher_logits(trainer.train_dataset):
            trainer.data_collator = (_TeacherCollator if training else _PlainCollator)(own)
        try:
            yield
        finally:
            trainer.data_collator = own

    @contextmanager
    def keeping_column(self) -> Iterator[None]:
        """Inside the block, count the logits among the labels, which the trainer does not drop from the rows.

        The trainer lists its columns once, perhaps before the rows have this one.
        """
        trainer, own = self._trainer, self._trainer.label_names
        trainer.label_names = [*own, TEACHER_LOGITS]
        try:
            yield
        finally:
            trainer.label_names = own

    def distillation(self, model: nn.Module, inputs: Any) -> DistillationLoss | None:
        """Take the teacher's logits out of a batch, and return the loss with them; None in evaluation, or without any.

        Raises:
            LightPeftError: the batch has no logits although the training rows do.
        """
        logits = inputs.pop(TEACHER_LOGITS, None) if isinstance(inputs, MutableMapping) else None
        if not model.training or not has_teacher_logits(self._trainer.train_dataset):
            return None
        if logits is None:
            lost = f"a batch has no {TEACHER_LOGITS}, although the training rows do"
            raise LightPeftError(f"{lost}; use a data collator that keeps that column")
        return DistillationLoss(self._trainer, logits, inputs.get("labels"), self.weight)


@dataclass(frozen=True)
class DistillationLoss:
    """Loss of a batch with a teacher's logits."""

    trainer: Host
    logits: Tensor
    """[rows, classes], [rows, options] (-inf where a row has fewer), [rows, length, classes] or [rows, numbers]."""
    labels: Tensor | None
    weight: float

    def loss(self, usual: Callable[..., Any], **options: Any) -> Tensor:
        """Compute the weighted sum of the trainer's loss and the teacher's.

        Args:
            usual: the trainer's own loss, called with the options.
        """
        own, outputs = usual(**{**options, "return_outputs": True})
        distances = self._distances(outputs["logits"])
        return (1 - self.weight) * own + self.weight * self._reduce(distances, options.get("num_items_in_batch"))

    def _distances(self, student: Tensor) -> Tensor:
        """Compute the divergence (for numbers, the squared difference) between student and teacher, one per output."""
        teacher, student, kind = self.logits, student.float(), output_kind_of(self.trainer.model)
        if kind == "numbers":
            return (student.reshape(teacher.shape) - teacher).square().mean(-1)
        if kind == "tokens":
            assert self.labels is not None
            labeled = self.labels != IGNORED
            student, teacher = student[labeled], teacher[labeled]
        temperature = TEMPERATURES[kind]
        of_student, of_teacher = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
        return temperature**2 * kl_div(of_student, of_teacher, reduction="none").sum(-1)

    def _reduce(self, distances: Tensor, count: Any) -> Tensor:
        """Reduce the distances to one number, in the same way as the trainer's own loss."""
        mean = distances.sum() / max(len(distances), 1)
        if not isinstance(count, ReadRecorder):
            return mean
        trainer = self.trainer
        total = distances.sum() / count if count.read else mean
        many = trainer.accelerator.num_processes // trainer.get_tp_size()
        return total * many if trainer.args.average_tokens_across_devices else total


@dataclass(frozen=True)
class _PlainCollator:
    """Collator that drops a teacher's logits from its rows."""

    collate: Callable[[list[dict[str, Any]]], Any]

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        return self.collate([{name: row[name] for name in row if name != TEACHER_LOGITS} for row in rows])


@dataclass(frozen=True)
class _TeacherCollator(_PlainCollator):
    """Collator that adds the padded teacher logits of its rows to the batch."""

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        logits = [torch.as_tensor(row[TEACHER_LOGITS], dtype=torch.float32) for row in rows]
        batch = super().__call__(rows)
        if logits[0].dim() == 2:
            batch[TEACHER_LOGITS] = _place_at_labels(logits, rows, batch["labels"])
        else:
            of_rows = [of_row.reshape(-1) for of_row in logits]
            batch[TEACHER_LOGITS] = nn.utils.rnn.pad_sequence(of_rows, batch_first=True, padding_value=-torch.inf)
        return batch


def _place_at_labels(logits: Sequence[Tensor], rows: Sequence[Mapping[str, Any]], labels: Tensor) -> Tensor:
    """Place token logits at the labels of a padded batch, [rows, length, classes]; 0 elsewhere.

    Raises:
        LightPeftError: the number of logits or of labels in the batch differs from that of the rows.
    """
    own = [torch.as_tensor(row["labels"] if "labels" in row else row["label"]) != IGNORED for row in rows]
    fits = [len(of_row) for of_row in own] == [len(of_row) for of_row in logits]
    there = labels != IGNORED
    fits = fits and int(there.sum()) == sum(int(of_row.sum()) for of_row in own)
    require(fits, f"{TEACHER_LOGITS} must have one entry per label of a row, and the collator must keep all labels")
    placed = torch.zeros(*labels.shape, logits[0].shape[-1])
    placed[there] = torch.cat([of_row[mask] for of_row, mask in zip(logits, own, strict=True)])
    return placed
