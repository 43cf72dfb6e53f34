"""The teacher of a trainer: a model, or its folder or name, that computes logits of the training rows once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightpeft.adapters.light_adapter import load_light
from lightpeft.adapters.merging import load_merged
from lightpeft.compat.transformers import used_columns
from lightpeft.config import ModelConfig
from lightpeft.console import bars
from lightpeft.errors import LightPeftError, require
from lightpeft.machine import autocasting, preserve_random_state
from lightpeft.models.batches import IGNORED, TEACHER_LOGITS, without_labels
from lightpeft.models.loading import load_model
from lightpeft.models.patching import in_mode
from lightpeft.models.sharding import without_graph
from lightpeft.models.task_heads import DEFAULT_LABEL, TaskHead
from lightpeft.models.unwrap import transformers_model
from lightpeft.profiling.live import device_of, move_batch
from lightpeft.saving.adapter_files import DESCRIPTION
from lightpeft.saving.peft_adapter import ADAPTER_CONFIG, load_adapter, read_adapter
from lightpeft.saving.whole import MERGED
from lightpeft.training.arguments import half_precision
from lightpeft.training.host import Host
from lightpeft.training.teacher_logits import (
    OutputKind,
    has_teacher_logits,
    one_class_warning,
    output_kind_of,
    split_over_processes,
    with_teacher_logits,
)

Teacher = nn.Module | str | os.PathLike[str]
"""A model, or the folder of one: a light adapter, a merged light model, a PEFT adapter, or a transformers model, which
may also be a name on the hub."""


def add_teacher_logits(trainer: Host, teacher: Teacher, warn: Callable[[str], None]) -> Any:
    """Return the training rows of a trainer with a column of the teacher's logits; unchanged if they have one.

    Args:
        teacher: has the same tokenizer as the model.
        warn: is called with a line if the teacher has learned nothing.

    Raises:
        LightPeftError: the teacher has another task, other classes or another vocabulary, or returns NaN; or the rows
            are no `datasets.Dataset`.
    """
    given = isinstance(teacher, nn.Module | str | os.PathLike)
    require(given, f"teacher is a {type(teacher).__name__}; give a model, or its folder or name")
    rows = trainer.train_dataset
    if has_teacher_logits(rows):
        return rows
    require(isinstance(rows, Dataset), "teacher: train_dataset must be a datasets.Dataset, to which it adds a column")
    output_kind = output_kind_of(trainer.model, rows)
    device = device_of(trainer.model)
    with preserve_random_state(device):
        model = teacher if isinstance(teacher, nn.Module) else _load_teacher(teacher, transformers_model(trainer.model))
        _check_teacher(model, transformers_model(trainer.model), output_kind)
        if model is not teacher:
            model.to(trainer.args.device)
        logits = split_over_processes(len(rows), _TeacherInference(trainer, model, output_kind))
    taught, config = with_teacher_logits(rows, logits), transformers_model(trainer.model).config
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    if (line := one_class_warning(logits, output_kind, names)) is not None:
        warn(line)
    return taught


class _TeacherInference:
    """Computes a teacher's logits of some of a trainer's rows."""

    def __init__(self, trainer: Host, teacher: nn.Module, output_kind: OutputKind) -> None:
        self._trainer, self._teacher, self._output_kind = trainer, teacher, output_kind
        self._rows = used_columns(trainer, trainer.train_dataset)

    def __call__(self, numbers: Sequence[int]) -> list[Tensor]:
        """Return the logits of the rows with these numbers, float32 on the CPU; batches have rows of similar length."""
        trainer, rows = self._trainer, self._rows
        size, lengths = trainer.args.eval_batch_size, [len(ids) for ids in rows["input_ids"]]
        order = sorted(numbers, key=lengths.__getitem__, reverse=True)
        device, autocast = device_of(self._teacher), half_precision(trainer.args)
        found: dict[int, Tensor] = {}
        starts = range(0, len(order), size)
        with in_mode(self._teacher, training=False):
            for start in bars.progress(starts, len(starts), "Teacher logits"):
                part = [rows[number] for number in order[start : start + size]]
                batch = trainer.data_collator([dict(row) for row in part])
                with without_graph(self._teacher), autocasting(device, autocast):
                    output = self._teacher(**move_batch(without_labels(batch), device))
                of_rows = zip(order[start : start + size], self._split_rows(output.logits, batch, part), strict=True)
                found.update(of_rows)
        return [found[number] for number in numbers]

    def _split_rows(self, logits: Tensor, batch: Any, rows: Sequence[Any]) -> list[Tensor]:
        """Split a batch's logits into rows, without padding."""
        logits = logits.float().cpu()
        if self._output_kind == "options":
            return [of_row[: len(row["input_ids"])] for of_row, row in zip(logits, rows, strict=True)]
        if self._output_kind != "tokens":
            return list(logits.reshape(len(rows), -1))
        labels = [torch.as_tensor(row["labels"] if "labels" in row else row["label"]) for row in rows]
        there = [of_row[places] for of_row, places in zip(logits, batch["labels"] != IGNORED, strict=True)]
        return [_scatter_labeled(of_row, own != IGNORED) for of_row, own in zip(there, labels, strict=True)]


def _scatter_labeled(logits: Tensor, there: Tensor) -> Tensor:
    """Scatter logits of labeled tokens, [labeled, classes], to all tokens of a row, [tokens, classes]; 0 elsewhere.

    Args:
        there: True for labeled tokens, [tokens].
    """
    placed = torch.zeros(len(there), logits.shape[-1])
    placed[there] = logits
    return placed


# -- a teacher that fits -------------------------------------------------------------------------------------------


def _check_teacher(teacher: nn.Module, student: PreTrainedModel, output_kind: OutputKind) -> None:
    """Refuse a teacher of another task, other classes or another vocabulary."""
    inner = transformers_model(teacher)
    theirs, ours = inner.config, student.config
    name = f"the teacher ({type(inner).__name__})"
    same = type(inner).__name__.rpartition("For")[2] == type(student).__name__.rpartition("For")[2]
    same = same and output_kind_of(teacher) == output_kind
    require(same, f"{name} has another task than the model ({type(student).__name__}); use a teacher of the same task")
    if output_kind != "options":
        counts = f"{name} has {theirs.num_labels} outputs, and the model {ours.num_labels}"
        require(theirs.num_labels == ours.num_labels, f"{counts}; use a teacher with the same labels")
    if output_kind in ("classes", "tokens"):
        orders = [[names.id2label[i] for i in range(names.num_labels)] for names in (theirs, ours)]
        named = not any(all(DEFAULT_LABEL.fullmatch(str(label)) for label in order) for order in orders)
        listed = " and the model ".join(", ".join(map(str, order)) for order in orders)
        require(
            not named or orders[0] == orders[1], f"{name} has the labels {listed}; use the same labels in one order"
        )
    sizes = [config.get_text_config().vocab_size for config in (theirs, ours)]
    other = f"{name} has another tokenizer: {sizes[0]:,} tokens, and the model {sizes[1]:,}"
    way = f"use lightpeft run, which loads both tokenizers, or add the teacher's logits as a column {TEACHER_LOGITS}"
    require(sizes[0] == sizes[1], f"{other}; {way}")


def _load_teacher(place: str | os.PathLike[str], student: PreTrainedModel) -> nn.Module:
    """Load a teacher from its folder, or by a model's name on the hub.

    Args:
        student: the model that learns, whose task and labels say which head to load.
    """
    folder, suffix = Path(place), type(student).__name__.rpartition("For")[2]
    if (folder / DESCRIPTION).is_file():
        return load_light(folder)
    if (folder / MERGED).is_file():
        return load_merged(folder)
    inside = f"teacher: {folder} is a run folder; use its model: {folder / 'adapter'} or {folder / 'model'}"
    require(not (folder / "config.yaml").is_file(), inside)
    auto = getattr(transformers, f"AutoModelFor{suffix}")
    if (folder / ADAPTER_CONFIG).is_file():
        settings = read_adapter(folder)
        head = TaskHead(suffix, auto, None, outputs="own" if suffix == "MultipleChoice" else "classes")
        names = [str(student.config.id2label[index]) for index in range(student.config.num_labels)]
        loaded = load_model(ModelConfig(name=str(settings.base_model_name_or_path)), head, names, to_prune=False)
        return load_adapter(loaded.model, folder, settings)
    try:
        loaded = load_model(ModelConfig(name=str(place)), TaskHead(suffix, auto, None), to_prune=False)
    except LightPeftError as error:
        raise LightPeftError(f"teacher: {error}") from error
    lacking = ", ".join(loaded.new_modules)
    require(not lacking, f"teacher {place} has no weights for {lacking}, so its logits would be random; train it first")
    return loaded.model
