"""Tiny models in few bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lightpeft.models.linears.linear_kinds import dense_weight, features, is_linear


def bnb_config(**settings: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **settings)


CONFIGS: dict[str, Callable[[], Any]] = {
    "nf4": lambda: bnb_config(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-double": lambda: bnb_config(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": lambda: bnb_config(load_in_8bit=True),
}


SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}


def densified(model: Any) -> Any:
    """A copy whose quantized layers are ordinary ones with the same weights."""
    copied = copy.deepcopy(model)
    for name, module in list(copied.named_modules()):
        if type(module) is not nn.Linear and not isinstance(module, BaseTunerLayer) and is_linear(module):
            linear = nn.Linear(*reversed(features(module)), bias=module.bias is not None)
            linear.weight, linear.bias = nn.Parameter(dense_weight(module)), module.bias
            copied.set_submodule(name, linear.requires_grad_(False))
    return copied
