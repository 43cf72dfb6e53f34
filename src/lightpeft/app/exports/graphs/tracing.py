"""What is traced: a merged model whose empty layers are constants, and inputs that it is traced with."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.compat.transformers import class_names
from lightpeft.errors import require
from lightpeft.models.families.registry import family_of
from lightpeft.models.linears.registry import features, is_linear
from lightpeft.models.task_heads import is_decoder

_ROWS, _LENGTH = 3, 7
"""Of what is traced; 0 and 1 would become constants of the graph."""
_OPTIONS = 2
_NEWS = 2
"""Tokens behind a cache."""
_TEXT = ("input_ids", "attention_mask")


def check_traceable(model: PreTrainedModel) -> None:
    """Raise `LightPeftError` where a model has no graph of one call: encoder-decoders, routed
    experts, and what does not read text."""
    kind = model.config.model_type
    require(not model.config.is_encoder_decoder, f"graphs are of encoders or decoders, and {kind} has both; use merged")
    routed = any(stack.experts for stack in family_of(kind).stacks)
    require(not routed, f"graphs have no place for routed experts, which this {kind} has; use merged")
    require(model.main_input_name == "input_ids", f"graphs are of models that read text; this one is of {kind}")


def writes(model: PreTrainedModel) -> bool:
    """Whether a model's graph has a KV cache."""
    return is_decoder(model.config) and hasattr(model, "generate") and model.can_generate()


def input_names(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """What the tokenizer makes that the model reads: `token_type_ids` too, where both know them."""
    made = _TEXT if tokenizer is None else tuple(tokenizer.model_input_names)
    return [name for name in made if reads(model, name)]


def reads(model: PreTrainedModel, name: str) -> bool:
    """Whether a model can be called with an argument of that name."""
    return name in inspect.signature(model.forward).parameters


def _example(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, left: bool = False
) -> dict[str, Tensor]:
    """A batch of random tokens, the rows ever shorter: [rows, length], or [rows, options, length].

    Args:
        left: pad on the left, as to write behind.
    """
    classes = class_names("MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES", "A graph of a model").values()
    options = (_OPTIONS,) if type(model).__name__ in classes else ()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (_ROWS, *options, _LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, _ROWS):
        mask[row, ..., slice(row) if left else slice(_LENGTH - row, None)] = 0
    ids = ids.masked_fill(mask == 0, model.config.pad_token_id or 0)
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": _second_half(ids, model)}
    return {name: values[name] for name in input_names(model, tokenizer) if name in values}


def _second_half(ids: Tensor, model: PreTrainedModel) -> Tensor:
    """Types of tokens as of a pair of texts, where the model knows two."""
    types = torch.zeros_like(ids)
    if getattr(model.config, "type_vocab_size", 0) > 1:
        types[..., ids.shape[-1] // 2 :] = 1
    return types


def traceable(model: PreTrainedModel) -> PreTrainedModel:
    """The model on the CPU, in float32 and evaluation mode, layers that read nothing as constants; in place."""
    model.cpu().float().eval()
    for name, module in list(model.named_modules()):
        if is_linear(module) and features(module)[1] == 0:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Constant(module))
    return model


class Constant(nn.Module):
    """A linear layer without inputs: what it gives is its bias. Not every runtime multiplies matrices of no columns."""

    bias: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        bias = layer.bias
        values = torch.zeros(features(layer)[0]) if bias is None else bias.detach().float()
        self.register_buffer("bias", values)

    def forward(self, states: Tensor) -> Tensor:
        """[..., 0] -> [..., outputs]."""
        return self.bias.expand(*states.shape[:-1], -1).clone()  # some families add to it in place


@torch.no_grad()
def traced(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """The arguments that a model is traced with.

    Of a model that writes these are some tokens behind a cache of some others: such a graph reads a prompt, behind an
    empty cache, as well as one token after the other. The cache keeps every token, also where layers see a window: what
    they do not see is masked, and the graph has no state but keys and values.
    """
    inputs = _example(model, tokenizer, left=writes(model))
    if not writes(model):
        return {**inputs, "use_cache": False}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    name = "cache" if reads(model, "cache") else "past_key_values"
    cache = {name: DynamicCache()}
    model(input_ids=ids[:, :-_NEWS], attention_mask=mask[:, :-_NEWS], **cache)
    news = {"input_ids": ids[:, -_NEWS:], "attention_mask": mask, "position_ids": positions(mask)[:, -_NEWS:]}
    return {name: value for name, value in {**news, **cache, "use_cache": True}.items() if reads(model, name)}


def positions(mask: Tensor) -> Tensor:
    """Places of the tokens of a padded batch, [rows, tokens]."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
