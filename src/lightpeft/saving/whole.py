"""A light model that stands on its own, written: pruned weights with PEFT merged into them, and `merged.json`.

Where all layers are equally wide and the family's config can say so, the folder is *native*: a checkpoint like any
other, for transformers and all that reads such. Else a plan beside the weights says it, and `load_merged` is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.errors import require
from lightpeft.files import check_file, explain_content_errors, file_checksum, read_json, replacing_folder, write_json
from lightpeft.models import repositories
from lightpeft.plans.records import PrunePlan
from lightpeft.saving.cards import CARD, CardForm, model_card, of_whole, read_by, read_by_transformers
from lightpeft.saving.description import base_facts, per_layer_config
from lightpeft.saving.uploading import send
from lightpeft.saving.whole_config import CONFIG, hide_config

MERGED = "merged.json"
"""What says that the weights beside it belong into a model that a plan has cut."""
ON_HUB = repositories.RepositoryForm(
    "merged light model",
    MERGED,
    (MERGED, CONFIG, "generation_config.json", "*.safetensors", "*.safetensors.index.json", *repositories.TOKENIZER),
)
"""Its files in a repository."""
WHOLE_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
"""Files of weights as transformers writes them; a model saved before may have had others of these."""


def read_merged(folder: str | Path) -> dict[str, Any]:
    """`merged.json` of a folder: base, plan, task, metrics and versions of the light model it was.

    Raises:
        LightPeftError: it has none, or one that is damaged or of a newer schema; or there is no config beside it.
    """
    for name in (MERGED, CONFIG):  # transformers would go on without its config
        require((Path(folder) / name).is_file(), f"{folder} is no merged light model: it has no {name}")
    description = read_json(Path(folder) / MERGED)
    with explain_content_errors(Path(folder) / MERGED):
        checksums = dict(description["checksums"])
    base_facts(description, Path(folder) / MERGED)
    for name, checksum in checksums.items():
        check_file(Path(folder), name, checksum)
    return description


def check_mergeable(config: PretrainedConfig) -> None:
    """Raise `LightPeftError` where PEFT cannot be merged into a model without loss, by the model's config."""
    quantised = getattr(config, "quantization_config", None) is not None
    require(not quantised, "the base is quantised, and merging would round it again; keep the light adapter")


def settle(model: PreTrainedModel, plan: PrunePlan, facts: Mapping[str, Any]) -> None:
    """Make a pruned model without PEFT one that saves itself so that it can be loaded.

    It gets a config that says its widths; where its family has no words for them, `save_pretrained` writes as
    `save_whole` does, for `load_merged`. `push_to_hub` sends the same with its card.

    Args:
        facts: what `merged.json` is to say of it.
    """
    model.light_plan = plan
    native = native_config(model, plan)
    facts = {**facts, "native": native is not None}
    if native is not None:
        model.config = native
    else:
        model.save_pretrained = partial(save_whole, model, facts)
    model.push_to_hub = partial(push_whole, model, facts)


def save_whole(
    model: PreTrainedModel,
    facts: Mapping[str, Any],
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    alone: bool = False,
    is_main_process: bool = True,
    **options: Any,
) -> None:
    """Write what transformers saves, with `merged.json`, a model card and, if given, a tokenizer beside it.

    Args:
        facts: what `merged.json` is to say of it, with `native`: whether its config says its widths.
        alone: nothing else that is in the folder stays.
        options: of transformers' `save_pretrained`.

    Raises:
        LightPeftError: the weights are quantised, or the folder cannot be written; nothing is half-written.
    """
    check_mergeable(model.config)
    if not is_main_process:
        return
    with replacing_folder(folder, last=MERGED, alone=alone, obsolete=WHOLE_WEIGHTS) as temporary:
        type(model).save_pretrained(model, temporary, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if not facts["native"]:
            hide_config(temporary)
        checksums = {file.name: file_checksum(file) for file in sorted(temporary.iterdir()) if file.is_file()}
        card = model_card(facts, model.light_plan, _card(facts, model.light_plan))
        (temporary / CARD).write_text(card, encoding="utf-8")
        write_json(temporary / MERGED, {**facts, "checksums": checksums})


def push_whole(
    model: PreTrainedModel,
    facts: Mapping[str, Any],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: repositories.Token = None,
    commit_message: str | None = None,
    **options: Any,
) -> str:
    """Send a merged light model to the hub; options are of `save_whole`, all else as of `uploading.send`."""

    def write(folder: Path) -> None:
        save_whole(model, facts, folder, **options)

    return send(write, repo_id, private=private, revision=revision, token=token, commit_message=commit_message)


def _card(facts: Mapping[str, Any], plan: PrunePlan) -> CardForm:
    native = facts["native"]
    code = read_by_transformers(facts["base"]["architecture"]) if native else read_by("load_merged")
    return of_whole(plan, code, library="transformers" if native else "lightpeft")


def native_config(whole: PreTrainedModel, plan: PrunePlan) -> PretrainedConfig | None:
    """A config that says how wide the layers of a pruned model are; None where its family has no words for that."""
    said = [*per_layer_config(whole.config.model_type, plan).values()]
    widths = {name: value for of_layer in said for name, value in of_layer.items()}
    if not widths or any(of_layer.items() - widths.items() for of_layer in said):
        return None
    config = copy.deepcopy(whole.config)
    fewer_heads = len(plan.blocks[0].heads) < plan.specs[0].heads
    if fewer_heads and plan.specs[0].per_head_arguments:  # no config says which entries are those of the kept heads
        return None
    try:
        # families that can have any size of heads read it even where their config has none
        if fewer_heads and not plan.specs[0].head_sizes:
            config.head_dim = plan.specs[0].head_dim
        for name, value in widths.items():
            if hasattr(config, name):
                setattr(config, name, value)
        config.validate()
        with torch.device("meta"):
            skeleton = type(whole)(copy.deepcopy(config))
    except (AttributeError, ValueError, ZeroDivisionError, RuntimeError, StrictDataclassError):
        return None  # the family cannot have these widths
    return config if _shapes(skeleton) == _shapes(whole) else None


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
