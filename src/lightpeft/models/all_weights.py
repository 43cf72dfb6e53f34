"""Training of all weights, not only those of PEFT (`light.train: all`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightpeft.compat.peft import BaseTunerLayer, ModulesToSaveWrapper
from lightpeft.models.unwrap import peft_weights, transformers_model


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that `light.train: all` trains, by name in the transformers model.

    These are all except embeddings, the head of a language model, and what PEFT trains and saves itself.
    """
    inner: PreTrainedModel = transformers_model(model)
    apart = (nn.Embedding, ModulesToSaveWrapper)
    output = inner.get_output_embeddings() if inner.can_generate() else None
    others = {
        id(parameter)
        for name, module in inner.named_modules()
        if isinstance(module, apart) or module is output or "embed" in name.rpartition(".")[2]
        for parameter in module.parameters()
    }
    layers = (module for module in inner.modules() if isinstance(module, BaseTunerLayer))
    others |= {id(parameter) for layer in layers for parameter in peft_weights(layer)}
    return {name: parameter for name, parameter in inner.named_parameters() if id(parameter) not in others}


def too_few_digits(model: nn.Module) -> str | None:
    """Return a warning if weights would train in bfloat16; None: all have another data type."""
    if all(parameter.dtype != torch.bfloat16 for parameter in trained_weights(model).values()):
        return None
    return "light.train: all would train bfloat16 weights, which lose small updates; load the model in float32"


def train_all(model: nn.Module, train: bool = True) -> None:
    """Make all weights trainable that `light.train: all` trains, or freeze them."""
    for parameter in trained_weights(model).values():
        parameter.requires_grad_(train)


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor], is_trainable: bool) -> None:
    """Replace the weights of a cut model by new parameters; the old ones, which models may share, do not change.

    Args:
        weights: tensors by the names of `trained_weights`.
        is_trainable: whether the new parameters are trainable.
    """
    inner = transformers_model(model)
    for name, parameter in trained_weights(model).items():
        owner, _, own = name.rpartition(".")
        value = weights[name].to(parameter.device, parameter.dtype)
        setattr(inner.get_submodule(owner), own, nn.Parameter(value, requires_grad=is_trainable))
