"""PEFT adapters in folders that anybody may have made: checked before PEFT believes them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel

from lightpeft.compat.transformers import apart_from_other_threads
from lightpeft.errors import LightPeftError, require
from lightpeft.files.foreign import parsing
from lightpeft.peft_kinds.sites.config_file import read_config

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
_ELSEWHERE = ("megatron_config", "prompt_tuning_init_state_dict_path", "adapters", "shadow_model", "layer_replication")
"""Settings by which PEFT imports modules, reads other files or loads other models, or copies layers."""

Shapes = dict[str, tuple[int, ...]]


def read_adapter(folder: Path, *, explicit: bool = False, allow_pickle: bool = False) -> PeftConfig:
    """The configuration of the adapter in a folder, light or as PEFT writes it.

    Args:
        explicit: it is a light adapter.
        allow_pickle: the weights may be pickled; they are then still read as weights alone.

    Raises:
        LightPeftError: it cannot be read, asks for what is elsewhere, or has no weights beside it.
    """
    with parsing(f"{folder} is not a readable PEFT adapter"):
        config = read_config(folder, light=explicit)
    for name in _ELSEWHERE:
        require(not getattr(config, name, None), f"{folder} is an adapter with {name}, which lightpeft does not load")
    pickled = not (folder / WEIGHTS).is_file() and (folder / PICKLED).is_file()
    require(
        allow_pickle or not pickled,
        f"{folder} has its weights pickled ({PICKLED}), not as safetensors; save it again, or if you trust its "
        "author: allow_pickle",
    )
    require(pickled or (folder / WEIGHTS).is_file(), f"{folder} is incomplete: {WEIGHTS} is missing")  # no hub name
    return config


def load_adapter(base: PreTrainedModel, folder: Path, config: PeftConfig, is_trainable: bool = False) -> PeftModel:
    """Put an adapter onto a model.

    Raises:
        LightPeftError: it does not fit; the model is then of no more use.
    """
    with parsing(f"{folder} does not fit its base"):
        return PeftModel.from_pretrained(base, str(folder), is_trainable=is_trainable, config=config)


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model like this one, without storage."""
    with apart_from_other_threads(), torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def check_fit(skeleton: PreTrainedModel, config: PeftConfig, folder: Path, *, exact: bool = True) -> None:
    """Compare the tensors of an adapter with those that it will have on a model, before any are made.

    Args:
        skeleton: a model as `skeleton_of` gives it; of no more use afterwards.
        exact: there are no more tensors than the model will have; else more are PEFT's to judge, which saves embeddings
            at times, and pickled ones are not looked at.

    Raises:
        LightPeftError: they are others.
    """
    try:
        expected = _expected(skeleton, config, folder)
    except LightPeftError as error:
        # some of PEFT's kinds look at values, which are not there
        if exact or not isinstance(error.__cause__, RuntimeError):
            raise
        return
    if not exact and not (folder / WEIGHTS).is_file():
        return
    found = shapes_in(folder / WEIGHTS)
    _report_difference(sorted(expected.keys() - found), f"{folder} does not fit its base: it lacks tensors")
    if exact:
        _report_difference(sorted(found.keys() - expected), f"{folder} has tensors that fit nowhere")
    other = sorted(name for name, shape in expected.items() if found[name] != shape)
    _report_difference(other, f"{folder} does not fit its base: tensors of another shape")


def _expected(skeleton: PreTrainedModel, config: PeftConfig, folder: Path) -> Shapes:
    config = copy.deepcopy(config)
    config.base_model_name_or_path = None  # the base may have moved; PEFT would warn
    config.inference_mode = True
    skeleton.name_or_path = ""  # PEFT would compare it, and take fewer tokens than there for trained embeddings
    with parsing(f"{folder} does not fit its base"), torch.device("meta"):
        tensors = get_peft_model_state_dict(get_peft_model(skeleton, config))
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def shapes_in(path: Path) -> Shapes:
    """Shapes of the tensors of a safetensors file, which are not read.

    Raises:
        LightPeftError: it is missing or damaged.
    """
    with parsing(f"{path} cannot be read"), safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _report_difference(names: Sequence[str], what: str) -> None:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    require(not names, f"{what}: {names[0] if names else ''}{more}")
