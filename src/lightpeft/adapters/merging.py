"""Merged light models: PEFT merged into the pruned weights, saved and loaded without the base."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.adapters.auto_classes import register_auto_classes
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
from lightpeft.models.loading import check_checkpoint
from lightpeft.models.repositories import Token
from lightpeft.models.unwrap import transformers_model
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.prune.discovery import ensure_family
from lightpeft.prune.surgery import apply_plan
from lightpeft.saving.description import (
    BaseFacts,
    Described,
    base_facts,
    facts_of,
    without_metrics,
)
from lightpeft.saving.on_hub import MERGED_MODEL, folder_of
from lightpeft.saving.tokens import tokenizer_of
from lightpeft.saving.whole import (
    MERGED,
    check_mergeable,
    make_saveable,
    native_config,
    read_merged,
    save_whole,
)
from lightpeft.saving.whole_config import CONFIG_FILE, own_config, read_own

_log = logging.getLogger(__name__)


def save_merged(
    model: Described,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    overwrite: bool = False,
) -> bool:
    """Merge a light model and save it as transformers does, with `merged.json` and a model card.

    A copy of the model is merged, which needs its memory once more; the model is unchanged.

    Args:
        model: a `LightModel`.
        folder: folder to write, new or empty.
        tokenizer: tokenizer to save with the model; None: that of the base, without cut tokens. If it cannot be
            loaded, none is saved, and a warning says so.
        overwrite: the folder may also hold a merged light model, which is deleted with all other files in it.

    Returns:
        True if the folder is native: transformers can load it without lightpeft.

    Raises:
        LightPeftError: the PEFT modules cannot be merged, the base is quantized, or the folder cannot be written;
            nothing is half-written.

    Example:
        ```python
        native = save_merged(load_light("adapter"), "merged")
        model = load_merged("merged")
        ```
    """
    require(hasattr(model, "light_plan"), f"save_merged got a {type(model).__name__}; give it a light model")
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
    """Load the tokenizer of a merged model's base; None if the model reads no text, or if loading fails."""
    if whole.main_input_name != "input_ids":
        return None
    try:
        return tokenizer_of(whole, from_dict(BaseFacts, facts["base"], "base."))
    except LightPeftError as error:
        _log.warning("no tokenizer is saved in %s: %s; pass tokenizer= to save_merged", folder, error)
        return None


def merged_copy(model: Described) -> PreTrainedModel:
    """Return a copy of a light model's pruned base with PEFT merged into it; the light model is unchanged.

    Raises:
        LightPeftError: the PEFT modules cannot be merged, or the base is quantized.
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
    token: Token = None,
) -> PreTrainedModel:
    """Load a merged light model: a plain transformers model, pruned, in eval mode.

    The weights go directly into the cut layers, so that memory never holds the dense model. `model.light_plan` lists
    the kept units.

    Args:
        folder: folder from `save_merged`, or name of the model on the hub, which is downloaded unless cached.
        dtype: data type of the weights; "auto": as saved.
        device: device of the model; None: the CPU.
        attn_implementation: attention backend; None: the default of the base.
        revision: branch, tag or commit on the hub; None: the main branch.
        token: hub token; None: that of the logged-in account, if any.

    Returns:
        The model, of its transformers class.

    Raises:
        LightPeftError: a file is missing, damaged or of a newer schema, or the weights do not fit the plan; or the hub
            has no such model.

    Example:
        ```python
        model = load_merged("merged", device="cuda")
        ```
    """
    folder = folder_of(folder, MERGED_MODEL, revision, token)
    description = read_merged(folder)
    facts = {name: value for name, value in description.items() if name not in ("schema_version", "checksums")}
    with explain_content_errors(folder / MERGED):
        plan, native = PrunePlan.from_dict(description["plan"]), bool(description["native"])
    saved = base_facts(description, folder / MERGED)
    of_base = read_own(folder).get("model_type") == saved.model_type
    require(of_base, f"{folder / CONFIG_FILE} has another model_type than {MERGED}; copy the folder again")
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
    require(not astray, f"the weights in {folder} do not fit its plan: {', '.join(astray[:3])}; copy the folder again")
    make_saveable(model, plan, without_metrics(facts))  # the metrics do not hold once it is trained further
    return model.eval() if device is None else model.eval().to(device)


def merged_config(folder: Path, saved: BaseFacts) -> PretrainedConfig:
    """Load the configuration of a merged light model: that of its family, with the base's widths if they are unequal.

    Args:
        saved: description of the base in `merged.json`.

    Raises:
        LightPeftError: the file is missing or damaged.
    """
    return own_config(folder, architecture_of(saved, "install the version that it was saved with"))


register_auto_classes(load_merged)
