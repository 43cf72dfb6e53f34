"""The forms that a model has on the hub: which files make each, and the download of one of them."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub

from lightpeft.errors import LightPeftError
from lightpeft.models.repositories import TOKENIZER, Repository, RepositoryForm, Token
from lightpeft.saving.adapter_files import DESCRIPTION, FILES
from lightpeft.saving.peft_adapter import ADAPTER_CONFIG, WEIGHTS
from lightpeft.saving.whole import MERGED
from lightpeft.saving.whole_config import CONFIG_FILE

LIGHT_ADAPTER = RepositoryForm("light adapter", DESCRIPTION, (DESCRIPTION, *FILES), "load_light")
MERGED_MODEL = RepositoryForm(
    "merged light model",
    MERGED,
    (MERGED, CONFIG_FILE, "generation_config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER),
    "load_merged",
)
PEFT_ADAPTER = RepositoryForm(
    "plain PEFT adapter", ADAPTER_CONFIG, (ADAPTER_CONFIG, WEIGHTS), "peft.PeftModel.from_pretrained"
)


def folder_of(place: str | Path, form: RepositoryForm, revision: str | None = None, token: Token = None) -> Path:
    """Return the folder of a path, or download the model of a hub name and return its folder.

    Raises:
        LightPeftError: `place` is a name, and there is no such model; a path is not checked.
    """
    repository = Repository.named(place, revision, token)
    if repository is None:
        return Path(place)
    found = repository.folder(form)
    if found is not None:
        return found
    if huggingface_hub.is_offline_mode():
        lacking = f"{repository} is not in the hub's cache, and the hub cannot be reached"
        raise LightPeftError(f"folder {place} does not exist, and {lacking}")
    other = repository.form_of(LIGHT_ADAPTER, MERGED_MODEL, PEFT_ADAPTER)
    if other is not None:
        kinds = f"a {other.what}, not a {form.what}"
        raise LightPeftError(f"{repository} on the hub is {kinds}; load it with {other.loader}")
    lacking = f"{repository} on the hub is not a {form.what}: it has no {form.marker}"
    raise LightPeftError(f"folder {place} does not exist, and {lacking}")
