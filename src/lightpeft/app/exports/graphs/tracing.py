"""Prepare a merged model for tracing: empty layers as constants, and example inputs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.compat.transformers import class_names
from lightpeft.errors import require
from lightpeft.models.families.family_table import family_of
from lightpeft.models.linears.linear_kinds import features, is_linear
from lightpeft.models.task_heads import is_decoder

_TRACED_ROWS, _TRACED_LENGTH = 3, 7
"""Rows and tokens of the example inputs; sizes 0 and 1 would become constants of the graph."""
_OPTIONS = 2
_NEW_TOKENS = 2
"""Tokens after the KV cache in the example inputs."""
_TEXT = ("input_ids", "attention_mask")


def check_traceable(model: PreTrainedModel) -> None:
    """Raise `LightPeftError` for encoder-decoders, routed experts, and models that do not read text."""
    kind = model.config.model_type
    require(
        not model.config.is_encoder_decoder,
        f"graph export does not support encoder-decoders such as {kind}; use form merged",
    )
    routed = any(stack.experts for stack in family_of(kind).stacks)
    require(not routed, f"graph export does not support routed experts, which this {kind} has; use form merged")
    require(
        model.main_input_name == "input_ids",
        f"graph export needs a model that reads text, and {kind} does not; use form merged",
    )


def writes(model: PreTrainedModel) -> bool:
    """Return True if a model generates text, so that its graph has a KV cache."""
    return is_decoder(model.config) and hasattr(model, "generate") and model.can_generate()


def input_names(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Return the tokenizer's columns that the model reads, with `token_type_ids` if both have them."""
    made = _TEXT if tokenizer is None else tuple(tokenizer.model_input_names)
    return [name for name in made if reads(model, name)]


def reads(model: PreTrainedModel, name: str) -> bool:
    """Return True if the model's forward has an argument of that name."""
    return name in inspect.signature(model.forward).parameters


def _example(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, left: bool = False
) -> dict[str, Tensor]:
    """Return a batch of random tokens with rows of decreasing length: [rows, length] or [rows, options, length].

    Args:
        left: True to pad on the left, as for generation.
    """
    classes = class_names("MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES", "A graph of a model")
    options = (_OPTIONS,) if type(model).__name__ in classes else ()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (_TRACED_ROWS, *options, _TRACED_LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, _TRACED_ROWS):
        mask[row, ..., slice(row) if left else slice(_TRACED_LENGTH - row, None)] = 0
    ids = ids.masked_fill(mask == 0, model.config.pad_token_id or 0)
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": _second_half(ids, model)}
    return {name: values[name] for name in input_names(model, tokenizer) if name in values}


def _second_half(ids: Tensor, model: PreTrainedModel) -> Tensor:
    """Return token types like those of a pair of texts, if the model has two; else zeros."""
    types = torch.zeros_like(ids)
    if getattr(model.config, "type_vocab_size", 0) > 1:
        types[..., ids.shape[-1] // 2 :] = 1
    return types


def make_traceable(model: PreTrainedModel) -> PreTrainedModel:
    """Change a model in place for tracing, and return it: CPU, float32, eval mode, empty layers as constants."""
    model.cpu().float().eval()
    for name, module in list(model.named_modules()):
        if is_linear(module) and features(module)[1] == 0:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Constant(module))
    return model


class Constant(nn.Module):
    """A linear layer without inputs, which returns its bias: some runtimes cannot multiply empty matrices."""

    bias: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        bias = layer.bias
        values = torch.zeros(features(layer)[0]) if bias is None else bias.detach().float()
        self.register_buffer("bias", values)

    def forward(self, states: Tensor) -> Tensor:
        """Return the bias as [..., outputs], for states [..., 0]."""
        return self.bias.expand(*states.shape[:-1], -1).clone()  # a copy: some families add to it in place


@torch.no_grad()
def trace_inputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Return the arguments that a model is traced with.

    For a model that generates text, these are some tokens after a filled KV cache: such a graph reads a prompt after an
    empty cache, and single tokens. The cache keeps every token, also for layers with a sliding window: a mask hides the
    others, and the graph has no state but keys and values.
    """
    inputs = _example(model, tokenizer, left=writes(model))
    if not writes(model):
        return {**inputs, "use_cache": False}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    name = "cache" if reads(model, "cache") else "past_key_values"
    cache = {name: DynamicCache()}
    model(input_ids=ids[:, :-_NEW_TOKENS], attention_mask=mask[:, :-_NEW_TOKENS], **cache)
    news = {
        "input_ids": ids[:, -_NEW_TOKENS:],
        "attention_mask": mask,
        "position_ids": positions(mask)[:, -_NEW_TOKENS:],
    }
    return {name: value for name, value in {**news, **cache, "use_cache": True}.items() if reads(model, name)}


def positions(mask: Tensor) -> Tensor:
    """Return the position of each token in a padded batch: int [rows, tokens], from an attention mask."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
