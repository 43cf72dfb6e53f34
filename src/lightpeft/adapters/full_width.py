"""Train small, infer large: convert a light adapter to a plain PEFT adapter over the dense base.

The cut is reversed: every kept channel of a projection goes back to its original position, and the adapter is zero at
removed channels (as in LoRAM, Zhang et al., ICLR 2025). Any program that loads PEFT adapters can serve the result,
without lightpeft and without a pruned model.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lightpeft.adapters.bases import architecture_of, load_base
from lightpeft.adapters.right_base import check_base, check_missing_weights, check_structure
from lightpeft.config import ModelConfig
from lightpeft.config.validation import from_dict
from lightpeft.errors import require
from lightpeft.files import check_sealed, check_vacant, read_tensors, replacing_folder
from lightpeft.files.foreign import parsing
from lightpeft.models.linears.bitsandbytes import prepare_quantized
from lightpeft.models.loading import load_model_config
from lightpeft.models.unwrap import transformers_model
from lightpeft.models.vocabulary.cutting import vocabulary_of
from lightpeft.peft_kinds.sites.base import Site
from lightpeft.peft_kinds.sites.live_sites import find_sites, own_adapter, simplify_config, widens_alone
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.prune.light_model import LightModel
from lightpeft.saving.adapter_files import DESCRIPTION, read_saved
from lightpeft.saving.description import BaseFacts, facts_of
from lightpeft.saving.peft_adapter import ADAPTER_CONFIG, WEIGHTS

_PREFIX = "base_model.model."
"""Prefix of module names in PEFT's files."""


def full_width(light: LightModel, base: PreTrainedModel | None = None, *, is_trainable: bool = False) -> PeftModel:
    """Convert a light model to a plain `PeftModel` over its dense base, with the whole vocabulary.

    Kept channels go back to their original positions; the adapter is zero at removed ones.

    Args:
        light: the light model; unchanged.
        base: the dense model that it was made from, into which PEFT modules are put; None: load it again from the
            light model's record of its base.
        is_trainable: True: adapter weights stay trainable; False: they are frozen, and the model is in eval mode.

    Returns:
        The model with an ordinary PEFT adapter.

    Raises:
        LightPeftError: the base is another one, cannot be loaded, or lacks weights that the adapter does not contain;
            or all weights trained (`light.train: all`).

    Example:
        ```python
        plain = full_width(load_light("adapter"))
        plain.save_pretrained("plain_adapter")  # an ordinary PEFT adapter
        ```
    """
    require(isinstance(light, LightModel), f"full_width got a {type(light).__name__}; give it a light model")
    _check_kept_apart(light.light_plan)
    saved = from_dict(BaseFacts, facts_of(light)["base"], "base.")
    name = own_adapter(light)
    vocabulary = vocabulary_of(transformers_model(light))
    embeddings = "auto" if vocabulary is None else False  # for which PEFT takes rows that are fewer
    config = light.peft_config[name]
    tensors = get_peft_model_state_dict(light, adapter_name=name, save_embedding_layers=embeddings)
    dense, lacking = load_base(saved, saved.place()) if base is None else (base, [])
    check_base(dense, saved, light.light_plan, "this light model", vocabulary=vocabulary)
    check_missing_weights(lacking, config, "this light model")
    return _load_expanded(dense, light.light_plan, config, {n: t.cpu() for n, t in tensors.items()}, is_trainable)


def load_full_width(light: str | Path, base: PreTrainedModel, *, is_trainable: bool = False) -> PeftModel:
    """Convert a saved light adapter to a plain `PeftModel` over its dense base, without making the pruned model.

    Args:
        light: folder of the light adapter.
        base: the dense model that it was made from, into which PEFT modules are put.
        is_trainable: True: adapter weights stay trainable; False: they are frozen, and the model is in eval mode.

    Raises:
        LightPeftError: a file is missing or altered, the base is another one, or all weights trained.
    """
    adapter = read_saved(Path(light))
    _check_kept_apart(adapter.plan)
    check_base(base, adapter.base, adapter.plan, str(light), vocabulary=adapter.vocabulary)
    return _load_expanded(base, adapter.plan, adapter.config, read_tensors(Path(light) / WEIGHTS), is_trainable)


def save_full_width(light: str | Path, base: ModelConfig, folder: str | Path, *, overwrite: bool = False) -> None:
    """Convert a saved light adapter to a folder of a plain PEFT adapter over the dense base.

    The base's weights are not read, unless the PEFT method needs them (DoRA).

    Args:
        light: folder of the light adapter.
        base: name or folder of its base.
        folder: folder to write, new or empty.
        overwrite: the folder may also hold a PEFT adapter, which is deleted with all other files in it.

    Raises:
        LightPeftError: a file is missing or altered, the base has another structure (or, where its weights are read, is
            another one), or the folder cannot be written; nothing is half-written.
    """
    light, folder = Path(light), Path(folder)
    _check_vacant(folder, overwrite)
    adapter = read_saved(light)
    _check_kept_apart(adapter.plan)
    if widens_alone(adapter.config):
        dense = _skeleton(adapter.base, base)
        check_structure(dense, adapter.base, adapter.plan, str(light))
    else:
        dense = load_base(adapter.base, base)[0]
        check_base(dense, adapter.base, adapter.plan, str(light), vocabulary=adapter.vocabulary)
    model, wide = _expand(dense, adapter.plan, adapter.config, read_tensors(light / WEIGHTS))
    (plain,) = model.peft_config.values()
    plain.inference_mode = True
    with replacing_folder(folder, last=ADAPTER_CONFIG, alone=True) as temporary:
        # not by the model, which has no storage: PEFT would move what it is given to where the model is
        plain.save_pretrained(str(temporary))
        save_file(wide, temporary / WEIGHTS, metadata={"format": "pt"})
        model.create_or_update_model_card(str(temporary))


def copy_full_width(source: Path, folder: str | Path, *, overwrite: bool = False) -> None:
    """Copy a plain PEFT adapter that a run wrote at full width.

    Args:
        source: folder of the adapter in the run.
        folder: folder to write, new or empty.
        overwrite: the folder may also hold a PEFT adapter, which is deleted with all other files in it.

    Raises:
        LightPeftError: a file is missing or altered, or the folder cannot be written; nothing is half-written.
    """
    _check_vacant(Path(folder), overwrite)
    check_sealed(source)
    with replacing_folder(folder, last=ADAPTER_CONFIG, alone=True) as temporary:
        for file in (ADAPTER_CONFIG, WEIGHTS, "README.md"):
            shutil.copyfile(source / file, temporary / file)


def _check_kept_apart(plan: PrunePlan) -> None:
    """Refuse a model whose base weights trained: their changes do not fit into an adapter over the dense base."""
    alone = "the base weights of this light model trained (light.train: all), so it cannot become a PEFT adapter"
    require(plan.train != "all", f"{alone}; use save_merged, or another form of export")


def _check_vacant(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds anything but a plain PEFT adapter, or one without `overwrite`."""
    plain = (folder / ADAPTER_CONFIG).is_file() and not (folder / DESCRIPTION).is_file()
    check_vacant(folder, replaceable=plain, overwrite=overwrite)


def _skeleton(saved: BaseFacts, base: ModelConfig) -> PreTrainedModel:
    """Make the dense base on the meta device."""
    architecture = architecture_of(saved, "install the version that it was saved with")
    config = load_model_config(base)
    for name, value in saved.config.arguments().items():
        setattr(config, name, value)
    with torch.device("meta"):
        return architecture(config)


def _load_expanded(
    dense: PreTrainedModel, plan: PrunePlan, config: PeftConfig, tensors: Mapping[str, Tensor], is_trainable: bool
) -> PeftModel:
    """Put PEFT modules with the expanded weights of a light adapter on its dense base.

    Args:
        config: configuration of the light adapter.
        tensors: weights of the light adapter, as PEFT saves them, on the CPU.
    """
    prepare_quantized(dense)
    model, wide = _expand(dense, plan, config, tensors)
    set_peft_model_state_dict(model, wide)
    if not is_trainable:
        model.requires_grad_(False)
    return model.train(is_trainable)


def _expand(
    dense: PreTrainedModel, plan: PrunePlan, config: PeftConfig, tensors: Mapping[str, Tensor]
) -> tuple[PeftModel, dict[str, Tensor]]:
    """Put PEFT modules on a dense model, and compute their weights from those of a light adapter.

    Args:
        dense: the base; may be on the meta device.
        config: configuration of the light adapter, with explicit module names.
        tensors: weights of the light adapter, as PEFT saves them, on the CPU.

    Returns:
        The PeftModel, and its weights by PEFT's names; they are not in the model yet.

    Raises:
        LightPeftError: the weights do not fit the base.
    """
    config = copy.deepcopy(config)
    simplify_config(config)
    config.inference_mode = False  # as in training, whatever the file says
    model = cast(PeftModel, get_peft_model(dense, config))
    wide, unfit = dict(tensors), "the weights of the light adapter do not fit its base"
    with parsing(unfit):
        for site in find_sites(model, plan.specs):
            wide |= _expand_site(site, f"{_PREFIX}{site.spec.name}.", plan, tensors)
    wide = {name: tensor.contiguous() for name, tensor in wide.items()}
    expected = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
    astray = sorted(name for name in expected.keys() | wide.keys() if expected.get(name) != _shape(wide.get(name)))
    require(not astray, f"{unfit}: {', '.join(astray[:3])}")
    return model, wide


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _expand_site(site: Site, prefix: str, plan: PrunePlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Expand the weights of one PEFT module to the dense width.

    Args:
        prefix: PEFT's name of the module; weights whose names begin with it are expanded.
    """
    learned = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    block = cast(int, site.spec.block)
    wide = site.unfitted(learned, plan.specs[block], plan.blocks[block])
    return {f"{prefix}{name}": tensor for name, tensor in wide.items()}
