"""Save merged light models: pruned weights with PEFT merged into them, and `merged.json`.

If all layers are equally wide and the family's config can express their width, the folder is *native*: an ordinary
checkpoint for transformers and all programs that read such. Else the plan has the widths, and `load_merged` is needed.
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
from lightpeft.models.repositories import Token
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.saving.cards import CARD, CardForm, loading_code, model_card, transformers_loading_code, whole_model_form
from lightpeft.saving.description import base_facts, per_layer_config
from lightpeft.saving.uploading import upload
from lightpeft.saving.whole_config import CONFIG_FILE, nest_config

MERGED = "merged.json"
"""Description file of a merged light model."""
WHOLE_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
"""Weight files that transformers writes; those of a previously saved model are deleted."""


def read_merged(folder: str | Path) -> dict[str, Any]:
    """Read `merged.json` of a folder, and verify the checksums of all its files.

    Returns:
        The description of the light model: base, plan, task, metrics and versions.

    Raises:
        LightPeftError: `merged.json` or the config is missing, a file is damaged, or the schema is newer.
    """
    for name in (MERGED, CONFIG_FILE):  # transformers would not complain about a missing config
        require((Path(folder) / name).is_file(), f"{folder} is not a merged light model: it has no {name}")
    description = read_json(Path(folder) / MERGED)
    with explain_content_errors(Path(folder) / MERGED):
        checksums = dict(description["checksums"])
    base_facts(description, Path(folder) / MERGED)
    for name, checksum in checksums.items():
        check_file(Path(folder), name, checksum)
    return description


def check_mergeable(config: PretrainedConfig) -> None:
    """Refuse a quantized base, into which PEFT cannot be merged without loss.

    Raises:
        LightPeftError: the config says that the model is quantized.
    """
    quantized = getattr(config, "quantization_config", None) is not None
    require(not quantized, "the base is quantized, and merging would round it again; keep the light adapter")


def make_saveable(model: PreTrainedModel, plan: PrunePlan, facts: Mapping[str, Any]) -> None:
    """Let a pruned model without PEFT save itself in a form that can be loaded.

    It gets a config with its widths; if its family's config cannot express them, `save_pretrained` calls `save_whole`,
    for `load_merged`. `push_to_hub` uploads the same files.

    Args:
        plan: plan of the light model.
        facts: content of `merged.json` without `native` and the checksums.
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
    """Save a pruned model as transformers does, with `merged.json`, a model card and, if given, a tokenizer.

    Args:
        facts: content of `merged.json` without the checksums; `native` is True if the config has the widths.
        folder: folder to write.
        tokenizer: saved with the model; None: none.
        alone: delete all other files in the folder.
        is_main_process: False: write nothing.
        options: keyword arguments of transformers' `save_pretrained`.

    Raises:
        LightPeftError: the weights are quantized, or the folder cannot be written; nothing is half-written.
    """
    check_mergeable(model.config)
    if not is_main_process:
        return
    with replacing_folder(folder, last=MERGED, alone=alone, obsolete=WHOLE_WEIGHTS) as temporary:
        type(model).save_pretrained(model, temporary, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if not facts["native"]:
            nest_config(temporary)
        checksums = {file.name: file_checksum(file) for file in sorted(temporary.iterdir()) if file.is_file()}
        card = model_card(facts, model.light_plan, _card_form(facts, model.light_plan))
        (temporary / CARD).write_text(card, encoding="utf-8")
        write_json(temporary / MERGED, {**facts, "checksums": checksums})


def push_whole(
    model: PreTrainedModel,
    facts: Mapping[str, Any],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: Token = None,
    commit_message: str | None = None,
    **options: Any,
) -> str:
    """Upload a merged light model to the hub.

    Args:
        facts: content of `merged.json` without the checksums.
        repo_id: repository as owner/name, which is created if it does not exist.
        private: True: create a private repository; None: the owner's default.
        revision: branch, which is created if it does not exist; None: the main branch.
        token: hub token with write access; None: that of the logged-in account.
        commit_message: message of the commit; None: a default.
        options: keyword arguments of `save_whole`.

    Returns:
        URL of the commit.
    """

    def write(folder: Path) -> None:
        save_whole(model, facts, folder, **options)

    return upload(write, repo_id, private=private, revision=revision, token=token, commit_message=commit_message)


def _card_form(facts: Mapping[str, Any], plan: PrunePlan) -> CardForm:
    native = facts["native"]
    code = transformers_loading_code(facts["base"]["architecture"]) if native else loading_code("load_merged")
    return whole_model_form(plan, code, library="transformers" if native else "lightpeft")


def native_config(whole: PreTrainedModel, plan: PrunePlan) -> PretrainedConfig | None:
    """Return a config with the widths of a pruned model's layers; None if its family's config cannot express them."""
    said = [*per_layer_config(whole.config.model_type, plan).values()]
    widths = {name: value for of_layer in said for name, value in of_layer.items()}
    if not widths or any(of_layer.items() - widths.items() for of_layer in said):
        return None
    config = copy.deepcopy(whole.config)
    fewer_heads = len(plan.blocks[0].heads) < plan.specs[0].heads
    if fewer_heads and plan.specs[0].per_head_arguments:  # per-head values of the config would not match the kept heads
        return None
    try:
        # families with free head sizes read head_dim even if their config does not define it
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
