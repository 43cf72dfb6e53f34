"""The one road from a path or a name to a live model: a run, an adapter, a merged or any other whole model."""

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
    said_of_task,
    to_device,
)
from lightpeft.app.folders.results import Model
from lightpeft.app.folders.run_folder import CONFIG, RunFolder, is_run
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.config import ModelConfig
from lightpeft.errors import LightPeftError, require
from lightpeft.files import check_sealed, read_json
from lightpeft.models.loading import LoadedModel, load_model
from lightpeft.models.repositories import Repository, RepositoryForm
from lightpeft.models.tokenizers import ensure_pad_token
from lightpeft.models.vocabulary.cutting import cut_model
from lightpeft.models.vocabulary.kept import Vocabulary
from lightpeft.prune.discovery import ensure_family
from lightpeft.saving import adapter_files, whole
from lightpeft.saving.adapter_files import DESCRIPTION
from lightpeft.saving.peft_adapter import ADAPTER_CONFIG, PICKLED, WEIGHTS
from lightpeft.saving.whole import MERGED

_FORMS: dict[str, type[Found]] = {
    DESCRIPTION: LightAdapter,
    MERGED: MergedModel,
    ADAPTER_CONFIG: PeftAdapter,
    "config.json": WholeModel,
}
"""File in a folder -> the form of the model there; the first that is there counts."""
_KINDS = "a run, a light adapter, a merged light model, a PEFT adapter or a transformers model"


def find_model(name: str | Path, base: str | None = None, settings: Mapping[str, Any] | None = None) -> Found:
    """Find out what a path or a name stands for.

    Args:
        name: folder of a finished run, of a light adapter or merged light model, of a PEFT adapter or of a transformers
            model; or the name of such an adapter or model on the hub, as owner/name or owner/name@revision.
        base: where an adapter's base is, if not where the adapter says.
        settings: of `ModelConfig`, in place of those that the model was trained with.

    Raises:
        LightPeftError: nothing of that kind is there, or it or its base is incomplete.
    """
    found = find_saved(name, base, settings)
    if found is not None:
        return found.checked()
    require(not Path(name).is_file(), f"{name} is a file; give the folder of {_KINDS}")
    repository, settings = Repository.named(name), dict(settings or {})
    if repository is not None and repository.revision is not None:
        name, settings["revision"] = repository.name, repository.revision
    try:
        return WholeModel.find(name, base, settings).checked()
    except LightPeftError as error:
        raise LightPeftError(f"there is no folder {name} here, and as a model's name: {error}") from error


def find_saved(name: str | Path, base: str | None = None, settings: Mapping[str, Any] | None = None) -> Found | None:
    """The same of a folder, or of an adapter or merged light model on the hub, whether its base is there or not.

    A revision among the settings is that of an adapter's base.

    Returns:
        What was found; None: there is no such folder, and whatever has that name on the hub transformers loads.
    """
    if Path(name).is_dir():
        return find_folder(Path(name), base, settings)
    repository, settings = Repository.named(name), settings or {}
    if repository is None:
        return None
    weights = (WEIGHTS, PICKLED) if settings.get("allow_pickle") else (WEIGHTS,)
    plain = RepositoryForm(PeftAdapter.form, ADAPTER_CONFIG, (ADAPTER_CONFIG, *weights))
    downloaded = repository.folder(adapter_files.ON_HUB, whole.ON_HUB, plain)
    return None if downloaded is None else replace(find_folder(downloaded, base, settings), name=str(name))


def find_folder(folder: Path, base: str | None = None, settings: Mapping[str, Any] | None = None) -> Found:
    """The same of a folder, whether the base of an adapter is there or not."""
    form = next((form for marker, form in _FORMS.items() if (folder / marker).is_file()), None)
    if form is not None:
        return form.find(folder, base, settings or {})
    nothing = f"{folder} is none of {_KINDS}: it has no {', '.join(_FORMS)}, {CONFIG}"
    require(is_run(folder), nothing)
    return find_result(RunFolder.at(folder), base, settings)


def find_result(run: RunFolder, base: str | None = None, settings: Mapping[str, Any] | None = None) -> Found:
    """The result of a run; arguments as for `find_model`.

    Raises:
        LightPeftError: it has none yet, or a damaged one.
    """
    run.need(run.last_training, "evaluate")
    config, form = run.config, _FORMS[ADAPTER_CONFIG if run.result == run.full else run.config.way.last_file]
    given = {name: value for name, value in vars(config.model).items() if name != "name"} | dict(settings or {})
    if form is WholeModel:
        base, given = None, given | {"revision": None, "gguf_file": None}
    else:
        base = base or config.model.name
    found = form.find(run.result, base, given)
    if form is not LightAdapter:
        check_sealed(run.result)
        found = replace(found, facts=_task_of(run))
    return replace(found, name=str(run.path), run=config)


def find_light(name: str | Path, base: str | None = None, settings: Mapping[str, Any] | None = None) -> LightAdapter:
    """The same, where only a light adapter, or the run of one, will do.

    Raises:
        LightPeftError: it is something else, or incomplete.
    """
    found = find_model(name, base, settings)
    if isinstance(found, LightAdapter):
        return found
    instead = "a light adapter or the run of one"
    if found.run is not None and found.run.way.prunes:  # which keeps what it learned at full width
        instead = f"its light adapter, {Path(name) / 'adapter'}; a plain PEFT adapter is in {Path(name) / 'full'}"
    raise LightPeftError(f"{found.name} is a {found.kind}; give {instead}")


def _task_of(run: RunFolder) -> dict[str, Any]:
    """What a run that leaves no light adapter says of its task; nothing, if an earlier version made it."""
    return said_of_task(read_json(run.task), run.task) if run.task.is_file() else {}


# -- live --------------------------------------------------------------------------------------------------------


def open_result(run: RunFolder, task: Task, base: PreTrainedModel | None = None) -> Model:
    """The result of a run for its own task; as `Found.open`."""
    return find_result(run).open(Wanted.of(task), base)


def open_base(
    model: ModelConfig,
    wanted: Wanted,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary | None = None,
    in_host_memory: bool = False,
) -> LoadedModel:
    """An untouched foundation model that is to be trained, with the head that is wanted, on the device at hand.

    Args:
        tokenizer: its tokenizer, which the model learns from what it is to pad with.
        vocabulary: the tokens that it is to have alone, which are also the tokenizer's; None: all.
        in_host_memory: leave it there: what is sharded goes to its device in parts.

    Raises:
        LightPeftError: it cannot be loaded, or cannot be pruned.
    """
    loaded = load_model(model, wanted.head, wanted.labels)
    ensure_family(loaded.model)
    if vocabulary is not None:
        cut_model(loaded.model, vocabulary)
    ensure_pad_token(tokenizer, loaded.model.config)
    return loaded if in_host_memory else replace(loaded, model=to_device(loaded.model))
