"""Open a path or a name as a live model: a run, an adapter, a merged light model or any other whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.app.folders.forms import (
    Found,
    LightAdapter,
    MergedModel,
    PeftAdapter,
    Wanted,
    WholeModel,
    read_task_facts,
    to_device,
)
from lightpeft.app.folders.results import Model
from lightpeft.app.folders.run_folder import RunFolder
from lightpeft.app.folders.stored_config import CONFIG, is_run
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.config import ModelConfig
from lightpeft.errors import LightPeftError, require
from lightpeft.files import check_sealed, read_json
from lightpeft.models.loading import LoadedModel, load_model
from lightpeft.models.repositories import Repository
from lightpeft.models.tokenizers import ensure_pad_token
from lightpeft.models.vocabulary.cutting import cut_model
from lightpeft.models.vocabulary.kept import Vocabulary
from lightpeft.prune.discovery import ensure_family
from lightpeft.saving.adapter_files import DESCRIPTION
from lightpeft.saving.on_hub import LIGHT_ADAPTER, MERGED_MODEL, PEFT_ADAPTER
from lightpeft.saving.peft_adapter import ADAPTER_CONFIG, PICKLED
from lightpeft.saving.whole import MERGED

_FORMS: dict[str, type[Found]] = {
    DESCRIPTION: LightAdapter,
    MERGED: MergedModel,
    ADAPTER_CONFIG: PeftAdapter,
    "config.json": WholeModel,
}
"""File in a folder -> form of the model there; the first existing file counts."""
_ACCEPTED = "a run, a light adapter, a merged light model, a PEFT adapter or a transformers model"


def find_model(name: str | Path, base: str | None = None, settings: Mapping[str, Any] | None = None) -> Found:
    """Find the model that a path or a name stands for; no weights are loaded.

    Args:
        name: folder of a finished run, of a light adapter or merged light model, of a PEFT adapter or of a transformers
            model; or the name of such an adapter or model on the hub, as owner/name or owner/name@revision.
        base: name or folder of an adapter's base, if it is not where the adapter says.
        settings: fields of `ModelConfig` that override those of training.

    Raises:
        LightPeftError: there is no such model, or it or its base is incomplete.
    """
    found = find_saved(name, base, settings)
    if found is not None:
        return found.checked()
    require(not Path(name).is_file(), f"{name} is a file; give a folder with {_ACCEPTED}")
    repository, settings = Repository.named(name), dict(settings or {})
    if repository is not None and repository.revision is not None:
        name, settings["revision"] = repository.name, repository.revision
    return WholeModel.find(name, base, settings).checked()


def find_saved(name: str | Path, base: str | None = None, settings: Mapping[str, Any] | None = None) -> Found | None:
    """Find a model in a folder, or an adapter or merged light model on the hub; its base need not exist.

    Args:
        name: a folder, or a name on the hub, as owner/name or owner/name@revision.
        base: name or folder of an adapter's base, if it is not where the adapter says.
        settings: fields of `ModelConfig` that override those of training; `revision` is that of an adapter's base.

    Returns:
        The model, not loaded; None if there is no such folder and the name is left to transformers.
    """
    if Path(name).is_dir():
        return find_folder(Path(name), base, settings)
    repository, settings = Repository.named(name), settings or {}
    if repository is None:
        return None
    pickled = (PICKLED,) if settings.get("allow_pickle") else ()
    plain = replace(PEFT_ADAPTER, files=(*PEFT_ADAPTER.files, *pickled))
    downloaded = repository.folder(LIGHT_ADAPTER, MERGED_MODEL, plain)
    return None if downloaded is None else replace(find_folder(downloaded, base, settings), name=str(name))


def find_folder(folder: Path, base: str | None = None, settings: Mapping[str, Any] | None = None) -> Found:
    """Find the model, or the result of a run, in a folder; the base of an adapter need not exist."""
    form = next((form for marker, form in _FORMS.items() if (folder / marker).is_file()), None)
    if form is not None:
        return form.find(folder, base, settings or {})
    nothing = f"{folder} has no {', '.join(_FORMS)} or {CONFIG}; give a folder with {_ACCEPTED}"
    require(is_run(folder), nothing)
    return find_result(RunFolder.at(folder), base, settings)


def find_result(run: RunFolder, base: str | None = None, settings: Mapping[str, Any] | None = None) -> Found:
    """Find the result of a run; no weights are loaded.

    Args:
        run: the folder of the run.
        base: name or folder of the base, if it is not where the run says.
        settings: fields of `ModelConfig` that override the run's.

    Raises:
        LightPeftError: the run has no result yet, or it is damaged.
    """
    run.need(run.last_training, "evaluate")
    config, form = run.config, _FORMS[ADAPTER_CONFIG if run.result == run.full else run.config.method_spec.last_file]
    given = {name: value for name, value in vars(config.model).items() if name != "name"} | dict(settings or {})
    if form is WholeModel:
        base, given = None, given | {"revision": None, "gguf_file": None}
    else:
        base = base or config.model.name
    found = form.find(run.result, base, given)
    if form is not LightAdapter:
        check_sealed(run.result)
        found = replace(found, facts=_task_facts_of(run))
    return replace(found, name=str(run.path), run=config)


def find_light(name: str | Path, base: str | None = None, settings: Mapping[str, Any] | None = None) -> LightAdapter:
    """Find a light adapter, alone or as the result of a run; no weights are loaded.

    Args:
        name: folder of the adapter or run, or a name on the hub.
        base: name or folder of the base, if it is not where the adapter says.
        settings: fields of `ModelConfig` that override those of training.

    Raises:
        LightPeftError: it is another kind of model, or incomplete.
    """
    found = find_model(name, base, settings)
    if isinstance(found, LightAdapter):
        return found
    instead = "a light adapter or the run of one"
    if found.run is not None and found.run.method_spec.prunes:  # its result is an adapter at full width
        instead = f"its light adapter, {Path(name) / 'adapter'}; a plain PEFT adapter is in {Path(name) / 'full'}"
    raise LightPeftError(f"{found.name} is a {found.kind}; give {instead}")


def _task_facts_of(run: RunFolder) -> dict[str, Any]:
    """Return the task's facts of a run without a light adapter; empty for a folder that lacks them."""
    return read_task_facts(read_json(run.task), run.task) if run.task.is_file() else {}


# -- live --------------------------------------------------------------------------------------------------------


def open_result(run: RunFolder, task: Task, base: PreTrainedModel | None = None) -> Model:
    """Return the live result of a run for its own task, in evaluation mode; a live `base` is changed in place."""
    return find_result(run).open(Wanted.of(task), base)


def open_base(
    model: ModelConfig,
    wanted: Wanted,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary | None = None,
    in_host_memory: bool = False,
) -> LoadedModel:
    """Load a base model for training, with the wanted head, on the accelerator if there is one.

    Args:
        model: how to load the model.
        wanted: the task, with head and labels.
        tokenizer: the model's tokenizer, which sets the padding token.
        vocabulary: tokens to keep, which are also the tokenizer's; None: all.
        in_host_memory: True to leave it in host memory, since sharding moves parts of it to devices.

    Raises:
        LightPeftError: the model cannot be loaded or pruned.
    """
    loaded = load_model(model, wanted.head, wanted.labels)
    ensure_family(loaded.model)
    if vocabulary is not None:
        cut_model(loaded.model, vocabulary)
    ensure_pad_token(tokenizer, loaded.model.config)
    return loaded if in_host_memory else replace(loaded, model=to_device(loaded.model))
