"""The weights of the stages of a run: written completely with checksums, which later stages check."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.adapters.light_adapter import load_light
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.files import CHECKSUMS, check_sealed, replacing_folder, seal, write_json
from lightpeft.prune.light_model import LightModel
from lightpeft.saving.adapter_files import DESCRIPTION
from lightpeft.saving.kept_weights import KEPT_WEIGHTS, copy_kept, write_kept
from lightpeft.saving.peft_adapter import load_adapter, read_adapter
from lightpeft.saving.whole import WHOLE_WEIGHTS

Model: TypeAlias = PeftModel | PreTrainedModel
"""Type of trained models: a model with PEFT or, for method full, a plain transformers model."""


def save_peft(model: PeftModel, folder: Path, *, with_base: bool = False) -> None:
    """Write a light adapter or a PEFT adapter, completely or not at all.

    Args:
        with_base: beside a PEFT adapter, also write the weights of its base, which have trained (`light.train: all`).
    """
    if isinstance(model, LightModel):
        model.save_pretrained(folder)
        return
    with replacing_folder(folder, last=CHECKSUMS) as temporary:
        model.save_pretrained(str(temporary))
        if with_base:
            write_kept(model, temporary)
        seal(temporary)


def open_peft(folder: Path, base: PreTrainedModel, *, is_trainable: bool = False) -> PeftModel:
    """Load an adapter that `save_peft` wrote over its live base, which is changed in place.

    Args:
        is_trainable: True to train it further; else the weights are frozen and the model is in eval mode.

    Raises:
        LightPeftError: a file is missing or altered, or the adapter does not fit the base.
    """
    if (folder / DESCRIPTION).is_file():
        return load_light(folder, base, is_trainable=is_trainable)
    check_sealed(folder)
    model = load_adapter(base, folder, read_adapter(folder), is_trainable)
    if (folder / KEPT_WEIGHTS).is_file():
        copy_kept(model, folder)
    return model


def save_dense(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a transformers model with its tokenizer, completely or not at all."""
    with replacing_folder(folder, last=CHECKSUMS, obsolete=WHOLE_WEIGHTS) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        seal(temporary)


def save_full(run: RunFolder, model: PeftModel, task: Mapping[str, Any]) -> None:
    """Write the full-width PEFT adapter of a light run.

    Args:
        task: facts of the task (`tasks.task_facts`), which go to task.json.
    """
    write_json(run.task, {"task": task})
    save_peft(model, run.full)


def save_result(run: RunFolder, model: Model, tokenizer: PreTrainedTokenizerBase, task: Mapping[str, Any]) -> None:
    """Write the result of training: an adapter or, for method full, a transformers model with its tokenizer.

    Args:
        task: facts of the task (`tasks.task_facts`). A light adapter contains them; all others need task.json.
    """
    if not isinstance(model, LightModel):
        write_json(run.task, {"task": task})
    if isinstance(model, PeftModel):
        save_peft(model, run.adapter)
    else:
        save_dense(model, tokenizer, run.model)
