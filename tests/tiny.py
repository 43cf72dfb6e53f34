"""Tiny random models of every family, batches for them, and random plans: the fixtures of the parity tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lightpeft.config import Budget, LightConfig
from lightpeft.estimation import Estimator
from lightpeft.masks import UnitMasks
from lightpeft.planning import make_plan
from lightpeft.records import BlockPlan, EstimationRecord, PrunePlan
from lightpeft.sites import find_sites
from lightpeft.structure import BlockSpec

VOCABULARY = 67
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def bert(**changes: Any) -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=48, num_labels=2, **changes))


def roberta(**changes: Any) -> PreTrainedModel:
    return RobertaForSequenceClassification(RobertaConfig(**SIZES, intermediate_size=48, num_labels=2, **changes))


def llama(kv_heads: int = 2, **changes: Any) -> PreTrainedModel:
    config = LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=kv_heads, pad_token_id=0, **changes)
    return LlamaForCausalLM(config)


def llama_classifier(**changes: Any) -> PreTrainedModel:
    config = LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, pad_token_id=0, num_labels=2, **changes)
    return LlamaForSequenceClassification(config)


def opt(**changes: Any) -> PreTrainedModel:
    config = OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, **changes)
    return OPTForCausalLM(config)


MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "bert": bert,
    "roberta": roberta,
    "llama-mha": lambda **changes: llama(kv_heads=4, **changes),
    "llama-gqa": lambda **changes: llama(kv_heads=2, **changes),
    "llama-mqa": lambda **changes: llama(kv_heads=1, **changes),
    "opt": opt,
}
"""One constructor a family, and Llama with all, some and one KV head. Adding a family is one more entry."""

VARIANTS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama-classifier": llama_classifier,
    "llama-bias": lambda **changes: llama(attention_bias=True, mlp_bias=True, **changes),
    "llama-head-dim": lambda **changes: llama(head_dim=12, **changes),
    "llama-tied": lambda **changes: llama(tie_word_embeddings=True, **changes),
    "opt-post-norm": lambda **changes: opt(do_layer_norm_before=False, **changes),
    "opt-no-bias": lambda **changes: opt(enable_bias=False, **changes),
}
"""Other heads and settings of the same families."""

ALL = MODELS | VARIANTS

DECODERS = [name for name in ALL if name.startswith(("llama", "opt")) and "classifier" not in name]

USUAL: dict[str, Any] = {"heads": 0.5, "modules": 0.3}
DROPPED: dict[str, Any] = {
    "heads": 0.6,
    "heads_scope": "global",
    "min_heads": 0,
    "neurons": 0.7,
    "min_neurons": 0,
    "modules": 0.3,
}
"""With `weak_sublayers`: the first layer loses its attention, the second its FFN."""


def make(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The tiny model `name` with random weights, biases and norms included."""
    torch.manual_seed(seed)
    model = ALL[name](**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3) if parameter.dim() > 1 else parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def with_lora(model: PreTrainedModel, seed: int = 0, trained: bool = True, **changes: Any) -> PeftModel:
    """LoRA on all projections; `trained` gives B values other than zero."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **changes}
    task = "SEQ_CLS" if "Classification" in type(model).__name__ else "CAUSAL_LM"
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, LoraConfig(task_type=task, **settings))
    if trained:
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return peft_model.eval()


def batch(
    rows: int = 3, length: int = 9, padding: str = "right", seed: int = 1, labels: bool = False
) -> dict[str, Tensor]:
    """Random token ids with padding on one side, or none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding != "none":
        for row in range(1, rows):
            cut = slice(length - 2 * row, None) if padding == "right" else slice(0, 2 * row)
            mask[row, cut] = 0
    ids[mask == 0] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if labels:
        inputs["labels"] = torch.randint(0, 2, (rows,), generator=generator)
    return inputs


def random_record(model: PeftModel, seed: int = 0, ties: bool = False) -> EstimationRecord:
    """A record of the model's structure with random scores under every criterion."""
    estimator = Estimator(model, LightConfig(length=2))
    estimator.start(total_steps=None)
    estimator.stop()
    estimator.steps = 2
    record = estimator.record()
    generator = torch.Generator().manual_seed(seed)
    for key, value in record.scores.items():
        scores = torch.rand(value.shape, generator=generator)
        record.scores[key] = (scores * 3).floor() if ties else scores
    return record


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference over the largest absolute value."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def weak_sublayers(record: EstimationRecord) -> EstimationRecord:
    """The record with scores of zero for the heads of the first layer and the neurons of the second."""
    weak = ("heads/mask/0", "neurons/mask/1")
    scores = {key: torch.zeros_like(value) if key in weak else value for key, value in record.scores.items()}
    return EstimationRecord(record.blocks, record.sites, scores, record.base_parameters, record.fingerprint)


def plan_for(model: PeftModel, seed: int = 3, **budget: Any) -> PrunePlan:
    """A plan from random scores; with the `DROPPED` budget, one that drops whole sub-layers."""
    record = random_record(model, seed)
    if budget.get("min_heads") == 0:
        record = weak_sublayers(record)
    return make_plan(record, Budget(**{**USUAL, **budget}))


def masked(model: PeftModel, plan: PrunePlan) -> PeftModel:
    """A dense copy that computes what the plan's pruned model must compute: masks of 0 and 1, pruned ranks zeroed."""
    reference = copy.deepcopy(model)
    zero_pruned_ranks(reference, plan)
    masks = UnitMasks(plan.specs)
    masks.set_plan(plan)
    masks.attach(reference)
    return reference


def zero_pruned_ranks(model: PeftModel, plan: PrunePlan) -> None:
    """Zero the columns of B of the ranks and modules that the plan removes."""
    with torch.no_grad():
        for site in find_sites(model, plan.specs):
            gone = sorted(set(range(site.spec.rank)) - set(plan.sites.get(site.spec.name, ())))
            site.up[:, gone] = 0.0


def kept_channels(spec: BlockSpec, kept: BlockPlan, slot: str) -> tuple[list[int] | None, list[int] | None]:
    """Output and input channels of a projection that stay (None: all), written out unit by unit."""

    def expand(heads: tuple[int, ...]) -> list[int]:
        return [head * spec.head_dim + channel for head in heads for channel in range(spec.head_dim)]

    outputs = {"q": expand(kept.heads), "k": expand(kept.kv_heads), "v": expand(kept.kv_heads)}
    outputs |= {"ffn_in": list(kept.neurons), "ffn_gate": list(kept.neurons)}
    inputs = {"o": expand(kept.heads), "ffn_out": list(kept.neurons)}
    return outputs.get(slot), inputs.get(slot)


def select(weight: Tensor, outputs: list[int] | None, inputs: list[int] | None) -> Tensor:
    """Rows and columns of a [out, in] weight (None: all)."""
    rows = weight if outputs is None else weight[outputs]
    return rows if inputs is None else rows[:, inputs]
