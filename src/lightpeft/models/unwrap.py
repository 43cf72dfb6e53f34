"""Access to wrapped modules: the transformers model in a PeftModel, the frozen layer in a PEFT module."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lightpeft.compat.peft import BaseTunerLayer, call_with_hooks


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PeftModel (also a nested one), or the model itself.

    Its hooks run in all passes afterwards, including those in which PEFT itself would bypass them.
    """
    inner: Any = model
    while isinstance(inner, PeftModel):
        call_with_hooks(inner)
        inner = inner.get_base_model()
    return inner


def base_layer(module: nn.Module) -> nn.Module:
    """Return the frozen layer inside a PEFT module, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def base_linear(model: nn.Module, name: str) -> nn.Module:
    """Return the frozen linear layer `name` of a transformers model, or of the one inside a PeftModel."""
    return base_layer(transformers_model(model).get_submodule(name))


def peft_weights(layer: BaseTunerLayer) -> list[nn.Parameter]:
    """Return the parameters of a PEFT module without those of the layer inside it."""
    inside = {id(parameter) for parameter in layer.get_base_layer().parameters()}
    return [parameter for parameter in layer.parameters() if id(parameter) not in inside]
