"""A teacher of a trainer: a live model, or one by its folder or name, that is asked once about the training rows."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
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
from lightpeft.models.task_heads import TaskHead
from lightpeft.models.unwrap import transformers_model
from lightpeft.profiling.live import device_of, move_batch
from lightpeft.saving.adapter_files import DESCRIPTION
from lightpeft.saving.peft_adapter import ADAPTER_CONFIG, load_adapter, read_adapter
from lightpeft.saving.whole import MERGED
from lightpeft.training.arguments import half_precision
from lightpeft.training.host import Host
from lightpeft.training.teaching import Manner, has_answers, manner_of, shared_out, with_answers

Teacher = nn.Module | str | os.PathLike[str]
"""A model, or the folder of one: a light adapter, a merged light model, a PEFT adapter, or a transformers model, which
may also be a name on the hub."""
_UNNAMED = re.compile(r"LABEL_\d+")


def taught_rows(trainer: Host, teacher: Teacher) -> Any:
    """The training rows of a trainer with the teacher's logits; as they are, if they have some.

    Args:
        teacher: reads the rows as they are: its tokenizer is the model's.

    Raises:
        LightPeftError: the teacher has another task, other classes or another vocabulary, or gives NaN; or the rows
            are no `datasets.Dataset`.
    """
    rows = trainer.train_dataset
    if has_answers(rows):
        return rows
    require(isinstance(rows, Dataset), "a teacher needs training rows that are a datasets.Dataset: it adds a column")
    manner = manner_of(trainer.model, rows)
    device = device_of(trainer.model)
    with preserve_random_state(device):
        model = teacher if isinstance(teacher, nn.Module) else _loaded(teacher, transformers_model(trainer.model))
        _check(model, transformers_model(trainer.model), manner)
        if model is not teacher:
            model.to(trainer.args.device)
        return with_answers(rows, shared_out(len(rows), _Asked(trainer, model, manner)))


class _Asked:
    """A teacher that can be asked about some rows of a trainer."""

    def __init__(self, trainer: Host, teacher: nn.Module, manner: Manner) -> None:
        self._trainer, self._teacher, self._manner = trainer, teacher, manner
        self._rows = used_columns(trainer, trainer.train_dataset)

    def __call__(self, numbers: Sequence[int]) -> list[Tensor]:
        """Logits of these rows, float32 on the CPU; rows of similar length share a batch."""
        trainer, rows = self._trainer, self._rows
        size, lengths = trainer.args.eval_batch_size, [len(ids) for ids in rows["input_ids"]]
        order = sorted(numbers, key=lengths.__getitem__, reverse=True)
        device, autocast = device_of(self._teacher), half_precision(trainer.args)
        found: dict[int, Tensor] = {}
        starts = range(0, len(order), size)
        with in_mode(self._teacher, training=False):
            for start in bars.progress(starts, len(starts), "The teacher answers"):
                part = [rows[number] for number in order[start : start + size]]
                batch = trainer.data_collator([dict(row) for row in part])
                with without_graph(self._teacher), autocasting(device, autocast):
                    output = self._teacher(**move_batch(without_labels(batch), device))
                of_rows = zip(order[start : start + size], self._of_rows(output.logits, batch, part), strict=True)
                found.update(of_rows)
        return [found[number] for number in numbers]

    def _of_rows(self, logits: Tensor, batch: Any, rows: Sequence[Any]) -> list[Tensor]:
        """A batch's logits row by row, without padding."""
        logits = logits.float().cpu()
        if self._manner == "options":
            return [of_row[: len(row["input_ids"])] for of_row, row in zip(logits, rows, strict=True)]
        if self._manner != "tokens":
            return list(logits.reshape(len(rows), -1))
        labels = [torch.as_tensor(row["labels"] if "labels" in row else row["label"]) for row in rows]
        there = [of_row[places] for of_row, places in zip(logits, batch["labels"] != IGNORED, strict=True)]
        return [_at(of_row, own != IGNORED) for of_row, own in zip(there, labels, strict=True)]


def _at(logits: Tensor, there: Tensor) -> Tensor:
    """Logits of labelled tokens, [labelled, classes], among all tokens of a row; 0 elsewhere."""
    placed = torch.zeros(len(there), logits.shape[-1])
    placed[there] = logits
    return placed


# -- a teacher that fits -------------------------------------------------------------------------------------------


def _check(teacher: nn.Module, student: PreTrainedModel, manner: Manner) -> None:
    """Refuse a teacher of another task, other classes or another vocabulary."""
    inner = transformers_model(teacher)
    theirs, ours = inner.config, student.config
    name = f"the teacher ({type(inner).__name__})"
    same = type(inner).__name__.rpartition("For")[2] == type(student).__name__.rpartition("For")[2]
    same = same and manner_of(teacher) == manner
    require(same, f"{name} answers another task than the model ({type(student).__name__}); give one of the same")
    if manner != "options":
        counts = f"{name} has {theirs.num_labels} outputs, and the model {ours.num_labels}"
        require(theirs.num_labels == ours.num_labels, f"{counts}; give a teacher of the same labels")
    if manner in ("classes", "tokens"):
        orders = [[names.id2label[i] for i in range(names.num_labels)] for names in (theirs, ours)]
        named = not any(all(_UNNAMED.fullmatch(str(label)) for label in order) for order in orders)
        listed = " and the model ".join(", ".join(map(str, order)) for order in orders)
        require(not named or orders[0] == orders[1], f"{name} has the labels {listed}; give them in one order")
    sizes = [config.get_text_config().vocab_size for config in (theirs, ours)]
    other = f"{name} reads {sizes[0]:,} tokens, and the model {sizes[1]:,}: another tokenizer"
    way = f"lightpeft run gives each its own, or add the teacher's logits as a column {TEACHER_LOGITS}"
    require(sizes[0] == sizes[1], f"{other}; {way}")


def _loaded(place: str | os.PathLike[str], student: PreTrainedModel) -> nn.Module:
    """A teacher by its folder, or by a model's name on the hub."""
    folder, suffix = Path(place), type(student).__name__.rpartition("For")[2]
    if (folder / DESCRIPTION).is_file():
        return load_light(folder)
    if (folder / MERGED).is_file():
        return load_merged(folder)
    inside = f"{folder} is a run; give what it has made, such as {folder / 'adapter'} or {folder / 'model'}"
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
    require(not lacking, f"teacher {place} has no weights for {lacking}: its answers would be random; train it first")
    return loaded.model
