"""Fewer positions: tables of learned absolute positions with the rows of the first ones alone.

A model that was trained on short texts takes nothing from the rows behind them. Rotary and relative positions have no
such table.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.errors import require
from lightpeft.models.families import max_positions
from lightpeft.models.tables import configs_of, like, shapes_of, tensor_at
from lightpeft.models.unwrap import transformers_model

_KEY = "max_position_embeddings"
_EMBEDDED = "inputs_embeds"
_TEXTS = ("input_ids", _EMBEDDED, "attention_mask", "decoder_input_ids", "decoder_attention_mask")
"""Arguments [..., tokens], or of embeddings [..., tokens, width]; a mask's tokens are also those of the cache."""


def cut_positions(model: nn.Module, tokenizer: PreTrainedTokenizerBase, tokens: int) -> PreTrainedTokenizerBase:
    """Leave a model the positions of texts of so many tokens; what it computes of these is the same, to the last bit.

    Longer texts are refused in one line from then on; `save_merged` and `export_model` write the short tables. A light
    adapter is over the whole base anyway and stays what it is.

    Args:
        model: a transformers model, pruned or not, or a `LightModel`; it is cut in place.
        tokenizer: its tokenizer, which stays as it is.
        tokens: of a text at most, special tokens and what is written included.

    Returns:
        The tokenizer with that for its `model_max_length`.

    Raises:
        LightPeftError: the model has no such table, or one of fewer positions; nothing was cut.
    """
    inner = transformers_model(model)
    gone = _surplus(inner, tokens)
    shapes, before = _cut_shapes(inner, gone), _positions(inner)
    for name, shape in shapes.items():
        owner, _, leaf = name.rpartition(".")
        tensor, module = tensor_at(inner, name), inner.get_submodule(owner)
        setattr(module, leaf, like(tensor, tensor.detach()[tuple(slice(size) for size in shape)].clone()))
        if isinstance(module, nn.Embedding):
            module.num_embeddings = shape[0]
    for config in configs_of(inner):
        if getattr(config, _KEY, None) == before:
            setattr(config, _KEY, before - gone)
    refuse_longer(inner, tokens)
    short = copy.deepcopy(tokenizer)
    short.model_max_length = min(tokens, tokenizer.model_max_length)
    return short


def positions_of(model: nn.Module) -> int | None:
    """Tokens of a text that a model was cut to; None: it has all positions."""
    return getattr(transformers_model(model), "light_positions", None)


def refuse_longer(model: PreTrainedModel, tokens: int) -> None:
    """Let a model refuse texts of more tokens in one line, where its table would end in an error about an index."""
    model.light_positions = tokens
    model.register_forward_pre_hook(partial(_check_length, tokens), with_kwargs=True)


def _check_length(tokens: int, model: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():  # a graph is traced with lengths that are no numbers
        return
    texts = {**named, **dict(zip(_TEXTS, given[:1], strict=False))}
    found = {name: texts[name] for name in _TEXTS if isinstance(texts.get(name), Tensor)}
    longest = max((text.shape[-2 if name == _EMBEDDED else -1] for name, text in found.items()), default=0)
    short = f"a text has {longest} tokens, and this model was left the positions of {tokens}"
    require(longest <= tokens, f"{short}; cut texts (truncation=True), or export the model with all positions")


def _positions(model: PreTrainedModel) -> int:
    """What the config calls its positions, those before the first token's included; 0: nothing."""
    return getattr(model.config.get_text_config(), _KEY, None) or 0


def _surplus(model: PreTrainedModel, tokens: int) -> int:
    """Positions that texts of so many tokens do not need."""
    room = max_positions(model.config.get_text_config()) or 0
    few = f"the model has {room} positions, and {tokens} are to stay; give 1 to {room}"
    require(not room or 1 <= tokens <= room, few)
    return room - tokens


def _cut_shapes(model: PreTrainedModel, gone: int) -> dict[str, tuple[int, ...]]:
    """Every parameter and buffer with an entry a position, by name, with the shape that it has without some."""
    config = model.config.get_text_config()
    none = f"{config.model_type} has no table of learned positions that could be cut; keep all positions"
    # relative distances are counted from the same setting, which would come to mean another thing
    require(_positions(model) > 0 and not getattr(config, "relative_attention", False), none)
    whole, less = (shapes_of(type(model), _with_fewer(model.config, fewer)) for fewer in (0, 1))
    steps = {
        name: [before - after for before, after in zip(shape, less[name], strict=True)]
        for name, shape in whole.items()
        if shape != less[name]
    }
    require(any(isinstance(tensor_at(model, name), nn.Parameter) for name in steps), none)
    several = [name for name, of_dims in steps.items() if not {*of_dims} <= {0, 1}]
    require(not several, f"{', '.join(several[:1])} has not one entry a position and cannot be cut; keep all positions")
    return {
        name: tuple(size - step * gone for size, step in zip(whole[name], of_dims, strict=True))
        for name, of_dims in steps.items()
    }


def _with_fewer(config: PretrainedConfig, fewer: int) -> PretrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    setattr(text, _KEY, getattr(text, _KEY) - fewer)
    return config
