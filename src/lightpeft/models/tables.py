"""Tensors that have a row a token: which these are, and how they are given fewer rows."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel


def shapes_of(architecture: type[PreTrainedModel], config: PretrainedConfig) -> dict[str, torch.Size]:
    """Of every parameter and buffer of a model with this config, tied ones under each of their names.

    The model is made without storage. Made for two configs, what has other shapes depends on what differs: no name is
    looked up.
    """
    with torch.device("meta"):
        model = architecture(copy.deepcopy(config))
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.shape for name, tensor in tensors}


def tensor_at(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name."""
    owner, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), leaf)
    return tensor


def like(tensor: Tensor, rows: Tensor) -> Tensor:
    """These rows as what the tensor is: a parameter or a buffer."""
    return nn.Parameter(rows, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else rows


def configs_of(model: nn.Module) -> list[PretrainedConfig]:
    """A model's config and those that its modules have, which some families copy; each once."""
    found = (getattr(module, "config", None) for module in model.modules())
    configs = [config for config in found if isinstance(config, PretrainedConfig)]
    return distinct(each for config in configs for each in (config, config.get_text_config()))


def distinct(configs: Iterable[PretrainedConfig]) -> list[PretrainedConfig]:
    """Each config once; one that is its own text config comes twice."""
    return list({id(config): config for config in configs}.values())
