"""PEFT adapters in untrusted folders: checked before PEFT loads them."""

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
"""Settings that make PEFT import modules, read other files, load other models, or copy layers."""

TensorShapes = dict[str, tuple[int, ...]]


def read_adapter(folder: Path, *, explicit: bool = False, allow_pickle: bool = False) -> PeftConfig:
    """Read and check the configuration of a light adapter or a plain PEFT adapter.

    Args:
        folder: folder of the adapter.
        explicit: True: it is a light adapter.
        allow_pickle: accept pickled weights, of which only tensors are unpickled.

    Raises:
        LightPeftError: the file cannot be read, has a setting that loads other files, or has no weights beside it.
    """
    with parsing(f"{folder} is not a readable PEFT adapter"):
        config = read_config(folder, light=explicit)
    for name in _ELSEWHERE:
        require(not getattr(config, name, None), f"{folder}: adapters with {name} are not supported; train one without")
    pickled = not (folder / WEIGHTS).is_file() and (folder / PICKLED).is_file()
    require(
        allow_pickle or not pickled,
        f"{folder} has pickled weights ({PICKLED}), not safetensors; save it again or, if you trust its author, "
        "set allow_pickle",
    )
    require(pickled or (folder / WEIGHTS).is_file(), f"{folder} is incomplete: {WEIGHTS} is missing; copy it again")
    return config


def load_adapter(base: PreTrainedModel, folder: Path, config: PeftConfig, is_trainable: bool = False) -> PeftModel:
    """Load an adapter onto a model, in place.

    Raises:
        LightPeftError: the adapter does not fit; the model must not be used any more.
    """
    with parsing(f"{folder} does not fit its base"):
        return PeftModel.from_pretrained(base, str(folder), is_trainable=is_trainable, config=config)


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with the same class and configuration on the meta device."""
    with apart_from_other_threads(), torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def check_adapter_fit(skeleton: PreTrainedModel, config: PeftConfig, folder: Path, *, exact: bool = True) -> None:
    """Compare names and shapes of an adapter's tensors with those that a model needs, before any is loaded.

    Args:
        skeleton: model from `skeleton_of`, which is used up.
        config: configuration of the adapter.
        folder: folder of the adapter.
        exact: True: refuse additional tensors. False: leave them to PEFT, which sometimes saves embeddings, and do not
            check pickled weights.

    Raises:
        LightPeftError: tensors are missing, additional, or of another shape.
    """
    try:
        expected = _expected_shapes(skeleton, config, folder, embeddings=False if exact else "auto")
    except LightPeftError as error:
        # some of PEFT's kinds look at values, which are not there
        if exact or not isinstance(error.__cause__, RuntimeError):
            raise
        return
    if not exact and not (folder / WEIGHTS).is_file():
        return
    found = shapes_in(folder / WEIGHTS)
    _report_difference(sorted(expected.keys() - found), f"{folder} does not fit its base: missing tensors")
    if exact:
        _report_difference(sorted(found.keys() - expected), f"{folder} does not fit its base: unexpected tensors")
    other = sorted(name for name, shape in expected.items() if found[name] != shape)
    _report_difference(other, f"{folder} does not fit its base: tensors of another shape")


def _expected_shapes(
    skeleton: PreTrainedModel, config: PeftConfig, folder: Path, embeddings: bool | str
) -> TensorShapes:
    """Return the shapes of the tensors that an adapter needs on a model, by PEFT's names.

    Args:
        embeddings: PEFT's `save_embedding_layers` at the time of saving.
    """
    config = copy.deepcopy(config)
    config.base_model_name_or_path = None  # the base may have moved; PEFT would warn
    config.inference_mode = True
    skeleton.name_or_path = ""  # PEFT would compare vocabulary sizes with it, and take a cut one for trained
    with parsing(f"{folder} does not fit its base"), torch.device("meta"):
        tensors = get_peft_model_state_dict(get_peft_model(skeleton, config), save_embedding_layers=embeddings)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def shapes_in(path: Path) -> TensorShapes:
    """Read the shapes of the tensors in a safetensors file, without their values.

    Raises:
        LightPeftError: the file is missing or damaged.
    """
    with parsing(f"{path} cannot be read"), safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _report_difference(names: Sequence[str], what: str) -> None:
    """Raise a line about the first of these tensor names; do nothing if there are none."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    require(not names, f"{what}: {names[0] if names else ''}{more}")
