"""A light model that stands on its own: pruned weights with PEFT merged into them, in a folder that needs no base.

Where all layers are equally wide and the family's config can say so, the folder is *native*: a checkpoint like any
other, for transformers and all that reads such. Else a plan beside the weights says it, and `load_merged` is needed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.compat.transformers import Checkpoint, with_reader
from lightpeft.config import ModelConfig
from lightpeft.config.validation import from_dict
from lightpeft.errors import LightPeftError, one_line, require
from lightpeft.files import (
    check_file,
    check_vacant,
    file_checksum,
    read_json,
    replacing_folder,
    understandable,
    write_json,
)
from lightpeft.files.foreign import check_folder, parsing
from lightpeft.models import repositories
from lightpeft.models.loading import check_checkpoint
from lightpeft.models.unwrap import transformers_model
from lightpeft.plans.records import PrunePlan
from lightpeft.prune.discovery import ensure_family
from lightpeft.prune.surgery import apply_plan
from lightpeft.saved.auto_classes import register
from lightpeft.saved.bases import architecture_of
from lightpeft.saved.cards import CARD, CardForm, model_card, of_whole, read_by, read_by_transformers
from lightpeft.saved.description import (
    BaseFacts,
    Described,
    base_facts,
    check_parts,
    facts_of,
    per_layer_config,
    unmeasured,
)
from lightpeft.saved.tokens import tokenizer_of
from lightpeft.saved.uploading import send
from lightpeft.saved.whole_config import CONFIG, hide_config, own_config, read_own

_log = logging.getLogger(__name__)

MERGED = "merged.json"
"""What says that the weights beside it belong into a model that a plan has cut."""
ON_HUB = repositories.Form(
    "merged light model",
    MERGED,
    (MERGED, CONFIG, "generation_config.json", "*.safetensors", "*.safetensors.index.json", *repositories.TOKENIZER),
)
"""Its files in a repository."""
WHOLE_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
"""Files of weights as transformers writes them; a model saved before may have had others of these."""


def save_merged(
    model: Described,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    overwrite: bool = False,
) -> bool:
    """Write a light model as whole weights: what transformers saves, with `merged.json` and a model card beside it.

    The model stays as it is; a copy of it is merged, which takes its memory once more.

    Args:
        model: a `LightModel`.
        folder: new or empty.
        tokenizer: to be saved with it; None: the base's, with the tokens that the model has, if the base is where it
            was. Else there is none, and a line in the log.
        overwrite: the folder may also hold a merged light model, which goes with all that is in it.

    Returns:
        Whether the folder is native: transformers alone loads it.

    Raises:
        LightPeftError: its PEFT modules cannot be merged, the base is quantised, or the folder cannot be written;
            nothing is half-written.
    """
    folder = Path(folder)
    check_vacant(folder, replaceable=(folder / MERGED).is_file(), overwrite=overwrite)
    whole = merged_copy(model)
    native = native_config(whole, model.light_plan) is not None
    facts = {**facts_of(model), "native": native}
    if tokenizer is None:
        tokenizer = _tokenizer_of_base(whole, facts, folder)
    save_whole(whole, facts, folder, tokenizer=tokenizer, alone=True)
    return native


def _tokenizer_of_base(
    whole: PreTrainedModel, facts: Mapping[str, Any], folder: Path
) -> PreTrainedTokenizerBase | None:
    """What texts are made tokens by for a model that reads any; None where it is not to be had."""
    if whole.main_input_name != "input_ids":
        return None
    try:
        return tokenizer_of(whole, from_dict(BaseFacts, facts["base"], "base."))
    except LightPeftError as error:
        _log.warning("no tokenizer is written into %s: %s; give save_merged one", folder, error)
        return None


def merged_copy(model: Described) -> PreTrainedModel:
    """A light model's pruned base with PEFT merged into it; the light model stays as it is.

    Raises:
        LightPeftError: its PEFT modules cannot be merged, or the base is quantised.
    """
    light = cast(PeftModel, model)
    check_mergeable(transformers_model(light).config)
    try:
        return copy.deepcopy(light).merge_and_unload()
    except RuntimeError as error:  # of PEFT: biases of LoRA, say, on a layer without one
        reason = one_line(error, 200)
        raise LightPeftError(f"this model cannot be merged; keep the light adapter: {reason}") from error


def load_merged(
    folder: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attention: str | None = None,
    revision: str | None = None,
    token: repositories.Token = None,
) -> PreTrainedModel:
    """Load what `save_merged` wrote: a plain transformers model, pruned, in evaluation mode.

    The weights go straight into the cut layers, so that memory never holds the dense model. `model.light_plan` says
    which units of it are here.

    Args:
        folder: what `save_merged` wrote; or its name on the hub, from where it is downloaded if it is not in the cache.
        dtype: of the weights; "auto": as they were saved.
        device: where to put the model; None: the CPU.
        attention: attention backend; None: the one the base would use.
        revision: branch, tag or commit on the hub; None: the main branch.
        token: for the hub; None: that of the account that is logged in, if any.

    Raises:
        LightPeftError: a file is missing, damaged or of a newer schema, or the weights are not those of the plan; or
            the hub has no such model.
    """
    folder = repositories.folder_of(folder, ON_HUB, revision, token)
    description = read_merged(folder)
    facts = {name: value for name, value in description.items() if name not in ("schema_version", "checksums")}
    with understandable(folder / MERGED):
        plan, native = PrunePlan.from_dict(description["plan"]), bool(description["native"])
    saved = base_facts(description, folder / MERGED)
    of_base = read_own(folder).get("model_type") == saved.model_type
    require(of_base, f"{folder / CONFIG} is of another family than {MERGED} says")
    architecture = architecture_of(saved, "install the version that it was saved with")
    config = merged_config(folder, saved)

    def read(model: PreTrainedModel, checkpoint: Checkpoint) -> Any:
        if not native:
            ensure_family(model)
            apply_plan(model, plan)
        return checkpoint.load(model)

    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    with parsing(f"{folder} cannot be loaded"):
        model, info = with_reader(architecture, read).from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            output_loading_info=True,
            **check_checkpoint(ModelConfig(name=str(folder)), weights=True),
            **options,
        )
    astray = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    require(not astray, f"the weights in {folder} are not those of its plan: {', '.join(astray[:3])}")
    settle(model, plan, unmeasured(facts))  # what was measured is from before it is trained on
    return model.eval() if device is None else model.eval().to(device)


def merged_config(folder: Path, saved: BaseFacts) -> PretrainedConfig:
    """The configuration of a merged light model: its family's, with the widths of the base where no config says others.

    Args:
        saved: of the base, in `merged.json`.

    Raises:
        LightPeftError: the file is missing or damaged.
    """
    return own_config(folder, architecture_of(saved, "install the version that it was saved with"))


def read_merged(folder: str | Path) -> dict[str, Any]:
    """`merged.json` of a folder: base, plan, task, metrics and versions of the light model it was.

    Raises:
        LightPeftError: it has none, or one that is damaged or of a newer schema; or there is no config beside it.
    """
    for name in (MERGED, CONFIG):  # transformers would go on without its config
        require((Path(folder) / name).is_file(), f"{folder} is no merged light model: it has no {name}")
    check_folder(Path(folder))
    description = read_json(Path(folder) / MERGED)
    with understandable(Path(folder) / MERGED):
        checksums = dict(description["checksums"] if description["schema_version"] > 1 else {})  # version 1 had none
    check_parts(description, Path(folder) / MERGED)
    checksums.pop(CARD, None)  # of earlier versions; people edit it
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
    """Send a merged light model to the hub; options are of `save_whole`, all else as of `uploading.upload`."""

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


register(load_merged)
