"""Access to tensors and configs of a model, to change its number of tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel


def shapes_of(architecture: type[PreTrainedModel], config: PretrainedConfig) -> dict[str, torch.Size]:
    """Return name -> shape of every parameter and buffer of a model with this config, tied ones under all names.

    The model is made without storage. A comparison of two configs shows which tensors depend on their difference.
    """
    with torch.device("meta"):
        model = architecture(copy.deepcopy(config))
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.shape for name, tensor in tensors}


def tensor_at(model: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer with this name."""
    owner, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), leaf)
    return tensor


def match_type(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return rows as a parameter or as a buffer, whichever `tensor` is."""
    return nn.Parameter(rows, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else rows


def configs_of(model: nn.Module) -> list[PretrainedConfig]:
    """Return the configs of a model and of its modules, which may be copies, each once."""
    found = (getattr(module, "config", None) for module in model.modules())
    configs = [config for config in found if isinstance(config, PretrainedConfig)]
    return distinct(each for config in configs for each in (config, config.get_text_config()))


def distinct(configs: Iterable[PretrainedConfig]) -> list[PretrainedConfig]:
    """Return each config object once."""
    return list({id(config): config for config in configs}.values())
