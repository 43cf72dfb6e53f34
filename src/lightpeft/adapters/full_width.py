"""Train small, infer large: what a pruned model has learned, as an ordinary PEFT adapter over the whole base.

The cut is read backwards: every channel of a cut projection goes back to where it was, and where the cut model had none
the adapter adds nothing (as in LoRAM, Zhang et al., ICLR 2025). The result is served without lightpeft and without a
pruned model, by whatever takes PEFT's adapters.
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
from lightpeft.adapters.right_base import check_base, check_brought, check_structure
from lightpeft.config import ModelConfig
from lightpeft.config.validation import from_dict
from lightpeft.errors import require
from lightpeft.files import check_sealed, check_vacant, read_tensors, replacing_folder
from lightpeft.files.foreign import parsing
from lightpeft.models.linears.bitsandbytes import prepare_quantised
from lightpeft.models.loading import load_model_config
from lightpeft.models.unwrap import transformers_model
from lightpeft.models.vocabulary.cutting import vocabulary_of
from lightpeft.peft_kinds.sites.base import Site
from lightpeft.peft_kinds.sites.registry import find_sites, own_adapter, simplify_config, widens_alone
from lightpeft.plans.records import PrunePlan
from lightpeft.prune.light_model import LightModel
from lightpeft.saving.adapter_files import DESCRIPTION, read_saved
from lightpeft.saving.description import BaseFacts, facts_of
from lightpeft.saving.peft_adapter import ADAPTER_CONFIG, WEIGHTS

_PREFIX = "base_model.model."
"""What PEFT's files write before the names of the model's modules."""


def full_width(light: LightModel, base: PreTrainedModel | None = None, *, is_trainable: bool = False) -> PeftModel:
    """What a light model has learned, as a plain `PeftModel` over its dense base, with all of its tokens.

    Args:
        light: stays as it is.
        base: the dense model that it was made from, in which PEFT modules are put; None: it is loaded anew from where
            the light model's base was.
        is_trainable: go on training; else the weights are frozen and the model is in eval mode.

    Raises:
        LightPeftError: the base is another one, cannot be loaded, or lacks weights that the adapter does not bring.
    """
    _check_kept_apart(light.light_plan)
    saved = from_dict(BaseFacts, facts_of(light)["base"], "base.")
    name = own_adapter(light)
    vocabulary = vocabulary_of(transformers_model(light))
    embeddings = "auto" if vocabulary is None else False  # for which PEFT takes rows that are fewer
    config = light.peft_config[name]
    tensors = get_peft_model_state_dict(light, adapter_name=name, save_embedding_layers=embeddings)
    dense, lacking = load_base(saved, saved.place()) if base is None else (base, [])
    check_base(dense, saved, light.light_plan, "this light model", vocabulary=vocabulary)
    check_brought(lacking, config, "this light model")
    return _filled(dense, light.light_plan, config, {n: t.cpu() for n, t in tensors.items()}, is_trainable)


def load_full_width(light: str | Path, base: PreTrainedModel, *, is_trainable: bool = False) -> PeftModel:
    """The same of a saved light adapter, whose pruned model is not made for that.

    Args:
        light: folder of the light adapter.
        base, is_trainable: as for `full_width`.

    Raises:
        LightPeftError: a file is missing or altered, or the base is another one.
    """
    adapter = read_saved(Path(light))
    _check_kept_apart(adapter.plan)
    check_base(base, adapter.base, adapter.plan, str(light), vocabulary=adapter.vocabulary)
    return _filled(base, adapter.plan, adapter.config, read_tensors(Path(light) / WEIGHTS), is_trainable)


def save_full_width(light: str | Path, base: ModelConfig, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a saved light adapter as PEFT's own folder over the dense base.

    The base's weights are not read, unless the kind of PEFT takes them (DoRA).

    Args:
        light: folder of the light adapter.
        base: where its base is.
        folder: new or empty.
        overwrite: the folder may also hold a PEFT adapter, which goes with all that is in it.

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
    model, wide = _widen(dense, adapter.plan, adapter.config, read_tensors(light / WEIGHTS))
    (plain,) = model.peft_config.values()
    plain.inference_mode = True
    with replacing_folder(folder, last=ADAPTER_CONFIG, alone=True) as temporary:
        # not by the model, which has no storage: PEFT would move what it is given to where the model is
        plain.save_pretrained(str(temporary))
        save_file(wide, temporary / WEIGHTS, metadata={"format": "pt"})
        model.create_or_update_model_card(str(temporary))


def copy_full_width(source: Path, folder: str | Path, *, overwrite: bool = False) -> None:
    """Copy the adapter that a run left at full width; arguments and errors as for `save_full_width`."""
    _check_vacant(Path(folder), overwrite)
    check_sealed(source)
    with replacing_folder(folder, last=ADAPTER_CONFIG, alone=True) as temporary:
        for file in (ADAPTER_CONFIG, WEIGHTS, "README.md"):
            shutil.copyfile(source / file, temporary / file)


def _check_kept_apart(plan: PrunePlan) -> None:
    """Refuse a model whose own weights trained: what it has learned is no adapter over the whole base."""
    alone = "all weights of this light model trained (light.train: all), so that PEFT over the whole base cannot say "
    require(plan.train != "all", f"{alone}what it has learned; use save_merged, or another form of export")


def _check_vacant(folder: Path, overwrite: bool) -> None:
    """Refuse a folder with something in it that is no plain PEFT adapter."""
    plain = (folder / ADAPTER_CONFIG).is_file() and not (folder / DESCRIPTION).is_file()
    check_vacant(folder, replaceable=plain, overwrite=overwrite)


def _skeleton(saved: BaseFacts, base: ModelConfig) -> PreTrainedModel:
    """The dense base without storage."""
    architecture = architecture_of(saved, "install the version that it was saved with")
    config = load_model_config(base)
    for name, value in saved.config.arguments().items():
        setattr(config, name, value)
    with torch.device("meta"):
        return architecture(config)


def _filled(
    dense: PreTrainedModel, plan: PrunePlan, config: PeftConfig, tensors: Mapping[str, Tensor], is_trainable: bool
) -> PeftModel:
    """The dense model with the adapter in it; arguments as for `_widen`."""
    prepare_quantised(dense)
    model, wide = _widen(dense, plan, config, tensors)
    set_peft_model_state_dict(model, wide)
    if not is_trainable:
        model.requires_grad_(False)
    return model.train(is_trainable)


def _widen(
    dense: PreTrainedModel, plan: PrunePlan, config: PeftConfig, tensors: Mapping[str, Tensor]
) -> tuple[PeftModel, dict[str, Tensor]]:
    """The dense model, which may be without storage, with PEFT modules in it, and the tensors that belong into these.

    Args:
        config: of the light model's adapter, with its modules one by one.
        tensors: of that adapter, as PEFT saves them, on the CPU.
    """
    config = copy.deepcopy(config)
    simplify_config(config)
    config.inference_mode = False  # as in training, whatever the file says
    model = cast(PeftModel, get_peft_model(dense, config))
    wide, unfit = dict(tensors), "what the light model has learned does not fit its base"
    with parsing(unfit):
        for site in find_sites(model, plan.specs):
            wide |= _widened(site, f"{_PREFIX}{site.spec.name}.", plan, tensors)
    wide = {name: tensor.contiguous() for name, tensor in wide.items()}
    expected = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
    astray = sorted(name for name in expected.keys() | wide.keys() if expected.get(name) != _shape(wide.get(name)))
    require(not astray, f"{unfit}: {', '.join(astray[:3])}")
    return model, wide


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _widened(site: Site, prefix: str, plan: PrunePlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to one module of the dense model, under PEFT's names, which begin with the prefix."""
    learned = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    block = cast(int, site.spec.block)
    wide = site.unfitted(learned, plan.specs[block], plan.blocks[block])
    return {f"{prefix}{name}": tensor for name, tensor in wide.items()}
