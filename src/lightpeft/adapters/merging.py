"""A light model that stands on its own: merged from a live one, and loaded without its base."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.adapters.auto_classes import register
from lightpeft.adapters.bases import architecture_of
from lightpeft.compat.transformers import Checkpoint, with_reader
from lightpeft.config import ModelConfig
from lightpeft.config.validation import from_dict
from lightpeft.errors import LightPeftError, one_line, require
from lightpeft.files import (
    check_vacant,
    explain_content_errors,
)
from lightpeft.files.foreign import parsing
from lightpeft.models import repositories
from lightpeft.models.loading import check_checkpoint
from lightpeft.models.unwrap import transformers_model
from lightpeft.plans.records import PrunePlan
from lightpeft.prune.discovery import ensure_family
from lightpeft.prune.surgery import apply_plan
from lightpeft.saving.description import (
    BaseFacts,
    Described,
    base_facts,
    facts_of,
    unmeasured,
)
from lightpeft.saving.tokens import tokenizer_of
from lightpeft.saving.whole import (
    MERGED,
    ON_HUB,
    check_mergeable,
    native_config,
    read_merged,
    save_whole,
    settle,
)
from lightpeft.saving.whole_config import CONFIG, own_config, read_own

_log = logging.getLogger(__name__)


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
    attn_implementation: str | None = None,
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
        attn_implementation: attention backend; None: the one the base would use.
        revision: branch, tag or commit on the hub; None: the main branch.
        token: for the hub; None: that of the account that is logged in, if any.

    Raises:
        LightPeftError: a file is missing, damaged or of a newer schema, or the weights are not those of the plan; or
            the hub has no such model.
    """
    folder = repositories.folder_of(folder, ON_HUB, revision, token)
    description = read_merged(folder)
    facts = {name: value for name, value in description.items() if name not in ("schema_version", "checksums")}
    with explain_content_errors(folder / MERGED):
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

    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
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


register(load_merged)
