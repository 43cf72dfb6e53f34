"""A light model that stands on its own: pruned weights with PEFT merged into them, in a folder that needs no base.

Where all layers are equally wide and the family's config can say so, the folder is *native*: a checkpoint like any
other, for transformers and all that reads such. Else a plan beside the weights says it, and `load_merged` is needed.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.checkpoint import LightModel, architecture_of, facts_of, model_card, per_layer_config
from lightpeft.discovery import ensure_family
from lightpeft.errors import LightPeftError, require
from lightpeft.files import check_file, file_checksum, read_json, replacing_folder, understandable, write_json
from lightpeft.loading import UNREADABLE, with_reader
from lightpeft.records import PrunePlan
from lightpeft.sites import transformers_model
from lightpeft.surgery import apply_plan

MERGED = "merged.json"
"""What says that the weights beside it belong into a model that a plan has cut."""
_CARD = (
    "Pruned model",
    "A whole model without the attention heads and FFN neurons that its task does not need, PEFT merged into it",
    "load_merged",
)


def save_merged(model: LightModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> bool:
    """Write a light model as whole weights: what transformers saves, with `merged.json` and a model card beside it.

    The model stays as it is; a copy of it is merged, which takes its memory once more.

    Args:
        folder: new or empty.
        tokenizer: to be saved with it.

    Returns:
        Whether the folder is native: transformers alone loads it.

    Raises:
        LightPeftError: its PEFT modules cannot be merged, the base is quantised, or the folder cannot be written;
            nothing is half-written.
    """
    folder = Path(folder)
    require(not folder.is_dir() or not any(folder.iterdir()), f"{folder} is not empty; give a new folder")
    quantised = getattr(transformers_model(model).config, "quantization_config", None) is not None
    require(not quantised, "the base is quantised, and merging would round it again; keep the light adapter")
    try:
        whole = copy.deepcopy(model).merge_and_unload()
    except RuntimeError as error:  # of PEFT: biases of LoRA, say, on a layer without one
        reason = " ".join(str(error).split())[:200]
        raise LightPeftError(f"this model cannot be merged; keep the light adapter: {reason}") from error
    native = _native_config(whole, model.light_plan)
    if native is not None:
        whole.config = native
    with replacing_folder(folder) as temporary:
        whole.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(model_card(model, *_CARD), encoding="utf-8")
        checksums = {file.name: file_checksum(file) for file in sorted(temporary.iterdir())}
        write_json(temporary / MERGED, {**facts_of(model), "native": native is not None, "checksums": checksums})
    return native is not None


def _native_config(whole: PreTrainedModel, plan: PrunePlan) -> PretrainedConfig | None:
    """A config that says how wide the layers of a pruned model are; None where its family has no words for that."""
    widths = list(per_layer_config(whole.config.model_type, plan).values())
    if not widths or any(of_layer != widths[0] for of_layer in widths):
        return None
    config = copy.deepcopy(whole.config)
    fewer_heads = len(plan.blocks[0].heads) < plan.specs[0].heads
    try:
        if fewer_heads:  # families that can have any size of heads read it even where their config has none
            config.head_dim = plan.specs[0].head_dim
        for name, value in widths[0].items():
            if hasattr(config, name):
                setattr(config, name, value)
        with torch.device("meta"):
            skeleton = type(whole)(copy.deepcopy(config))
    except (AttributeError, ValueError, ZeroDivisionError, RuntimeError):  # the family cannot have these widths
        return None
    return config if _shapes(skeleton) == _shapes(whole) else None


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def load_merged(
    folder: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """Load what `save_merged` wrote: a plain transformers model, pruned, in evaluation mode.

    The weights go straight into the cut layers, so that memory never holds the dense model. `model.light_plan` says
    which units of it are here.

    Args:
        dtype: of the weights; "auto": as they were saved.
        device: where to put the model; None: the CPU.
        attention: attention backend; None: the one the base would use.

    Raises:
        LightPeftError: a file is missing, damaged or of a newer schema, or the weights are not those of the plan.
    """
    folder = Path(folder)
    description = read_merged(folder)
    with understandable(folder / MERGED):
        plan, saved = PrunePlan.from_dict(description["plan"]), dict(description["base"])
        native = bool(description["native"])
        architecture = architecture_of(saved, "install the version that it was saved with")

    def read(model: PreTrainedModel, *rest: Any) -> Any:
        if not native:
            ensure_family(model)
            apply_plan(model, plan)
        return architecture._load_pretrained_model(model, *rest)

    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        model, info = with_reader(architecture, read).from_pretrained(
            str(folder), dtype=dtype, output_loading_info=True, **options
        )
    except (*UNREADABLE, RuntimeError) as error:
        raise LightPeftError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    astray = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    require(not astray, f"the weights in {folder} are not those of its plan: {', '.join(astray[:3])}")
    model.light_plan = plan
    return model.eval() if device is None else model.eval().to(device)


def read_merged(folder: str | Path) -> dict[str, Any]:
    """`merged.json` of a folder: base, plan, task, metrics and versions of the light model it was.

    Raises:
        LightPeftError: it has none, or one that is damaged or of a newer schema; or there is no config beside it.
    """
    for name in (MERGED, "config.json"):  # transformers would go on without its config
        require((Path(folder) / name).is_file(), f"{folder} is no merged light model: it has no {name}")
    description = read_json(Path(folder) / MERGED)
    with understandable(Path(folder) / MERGED):
        # those of version 1 have none
        for name, checksum in dict(description["checksums"] if description["schema_version"] > 1 else {}).items():
            check_file(Path(folder), name, checksum)
    return description
