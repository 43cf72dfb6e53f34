"""Tiny models with other PEFT kinds than plain LoRA: variants of LoRA, IA3, bottleneck adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from tiny import (
    make,
    task_type,
)
from torch import nn
from transformers import PreTrainedModel

from lightpeft.models.families.family_table import block_specs
from lightpeft.peft_kinds.bottleneck import (
    BottleneckConfig,
    BottleneckLayer,
)
from lightpeft.peft_kinds.sites.live_sites import check_peft
from lightpeft.plans.structure import SLOTS


def adapted(base: PreTrainedModel, trained: bool = True, adapter_name: str = "default", **settings: Any) -> PeftModel:
    """The base with adapters of width 5; `trained` gives their weights values other than at the start."""
    settings = {"size": 5, "task_type": task_type(base), **settings}
    if not settings.keys() & {"placement", "target_modules"}:
        settings["placement"] = "houlsby"
    model = get_peft_model(base, BottleneckConfig(**settings), adapter_name)
    if trained:
        train_by_hand(model)
    return model.eval()


def train_by_hand(model: nn.Module, seed: int = 5) -> None:
    """Random values for all adapter weights and learned scalings."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers(model).values():
            for parameter in layer.bottleneck_adapters.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def layers(model: nn.Module) -> dict[str, BottleneckLayer]:
    """The adapted layers by their name in the transformers model."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return {name: module for name, module in inner.named_modules() if isinstance(module, BottleneckLayer)}


INPUTS = ("o", "ffn_in", "ffn_out")
"""Slots whose IA3 modules are told to act on inputs: of layers cut along their inputs, and along their outputs."""


def projection_names(base: PreTrainedModel, slots: tuple[str, ...] = SLOTS) -> list[str]:
    return [name for block in block_specs(base) for slot, name in block.projections.items() if slot in slots]


def lora(base: PreTrainedModel, **settings: Any) -> LoraConfig:
    values = {
        "r": 6,
        "lora_alpha": 16,
        "target_modules": projection_names(base),
        "task_type": task_type(base),
        **settings,
    }
    return LoraConfig(**values)


def patterns(base: PreTrainedModel) -> LoraConfig:
    some = projection_names(base)[::3]
    return lora(base, use_rslora=True, rank_pattern=dict.fromkeys(some, 3), alpha_pattern=dict.fromkeys(some, 5))


def ia3(base: PreTrainedModel, slots: tuple[str, ...] = SLOTS, inputs: tuple[str, ...] = INPUTS) -> IA3Config:
    feedforward = projection_names(base, tuple(slot for slot in inputs if slot in slots))
    return IA3Config(
        target_modules=projection_names(base, slots), feedforward_modules=feedforward, task_type=task_type(base)
    )


VARIANTS: dict[str, Callable[[PreTrainedModel], PeftConfig]] = {
    "rslora": lambda base: lora(base, use_rslora=True),
    "patterns": patterns,
    "orthogonal": lambda base: lora(base, init_lora_weights="orthogonal"),
    "all-linear": lambda base: lora(base, target_modules="all-linear"),
    "tokens": lambda base: lora(base, trainable_token_indices=[3, 5]),
    "lora-bias": lambda base: lora(base, lora_bias=True),
    "dora": lambda base: lora(base, use_dora=True),
    "dora-rslora": lambda base: lora(base, use_dora=True, use_rslora=True),
    "ia3": ia3,
    "ia3-paper": lambda base: ia3(base, ("k", "v", "qkv", "ffn_out"), ("ffn_out",)),
}


EVERYWHERE = ("rslora", "dora", "ia3")


BASES = ("bert", "llama-gqa", "gpt2", "t5")
"""Separate, grouped, fused and transposed projections, and two stacks."""
CASES = [(name, variant) for name in BASES for variant in EVERYWHERE] + [
    ("llama-gqa", "patterns"),
    ("bert", "lora-bias"),
    ("gpt2", "lora-bias"),
    ("bert", "orthogonal"),
    ("bert", "all-linear"),
    ("t5", "all-linear"),
    ("gpt2", "tokens"),
    ("gpt2", "dora-rslora"),
    ("bert", "ia3-paper"),
    ("t5", "ia3-paper"),
]

TELLING_CASES = {("bert", "lora-only"), ("gpt2", "dora-bias"), ("llama-gqa", "dora"), ("llama-gqa", "patterns")}
TELLING_CASES |= {("t5", "rslora"), ("t5", "ia3"), ("gpt2", "tokens"), ("bert", "ia3-paper")}
"""Each variant and each base once or twice: those of `make test`."""


def with_variant(name: str, variant: str) -> PeftModel:
    base = make(name)
    return get_peft_model(base, VARIANTS[variant](base)).eval()


def trained(name: str, variant: str) -> PeftModel:
    """As it is after training that a pruner was made before."""
    model = with_variant(name, variant)
    check_peft(model)
    return shifted(model)


def shifted(model: PeftModel, seed: int = 4) -> PeftModel:
    """Every trainable parameter moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model
