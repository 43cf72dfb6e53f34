"""Tiny random models of every family, batches for them, and random plans: the fixtures of the parity tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

from lightpeft.estimation import Estimator
from lightpeft.config import LightConfig
from lightpeft.records import EstimationRecord

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

DECODERS = [name for name in MODELS if not name.endswith("bert") and name != "roberta"]


def make(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The tiny model `name` with random weights, biases and norms included."""
    torch.manual_seed(seed)
    model = MODELS[name](**changes)
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


def batch(rows: int = 3, length: int = 9, padding: str = "right", seed: int = 1, labels: bool = False) -> dict[str, Tensor]:
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


def choices(values: Sequence[Any], seed: int) -> Any:
    """A reproducible pick."""
    return values[seed % len(values)]
