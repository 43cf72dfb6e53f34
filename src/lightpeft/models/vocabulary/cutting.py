"""Cutting of a model to the rows of some tokens: input embeddings, tied or untied head, its biases, and configs."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lightpeft.errors import require
from lightpeft.models.tables import configs_of, distinct, match_type, shapes_of, tensor_at
from lightpeft.models.vocabulary.closure import KEEP_ALL
from lightpeft.models.vocabulary.kept import Vocabulary

_NEVER_WRITTEN = ("suppress_tokens", "begin_suppress_tokens")
"""Lists of suppressed tokens in a generation config; removed tokens are never generated anyway."""
_BY_TOKENS = ("bad_words_ids", "force_words_ids", "forced_decoder_ids", "sequence_bias")
"""Other settings of a generation config that contain tokens."""


@dataclass(frozen=True)
class _Cut:
    """Record of the cut on a model."""

    vocabulary: Vocabulary
    parameters: int
    """Number of removed parameters."""


def vocabulary_of(model: nn.Module) -> Vocabulary | None:
    """Return the kept tokens of a transformers model; None: its vocabulary was not cut."""
    cut: _Cut | None = getattr(model, "light_vocabulary", None)
    return None if cut is None else cut.vocabulary


def cut_parameters(model: nn.Module) -> int:
    """Return the number of parameters that were removed from a transformers model with its tokens."""
    cut: _Cut | None = getattr(model, "light_vocabulary", None)
    return 0 if cut is None else cut.parameters


def config_tokens(config: PretrainedConfig) -> set[int]:
    """Return the ids of the tokens that a config names, which must be kept."""
    text = config.get_text_config()
    values = (value for each in (config, text) for value in _token_settings(each).values())
    named = {number for value in values for number in (value if isinstance(value, list) else [value])}
    return {number for number in named if 0 <= number < text.vocab_size}


def cut_config(config: PretrainedConfig, vocabulary: Vocabulary) -> PretrainedConfig:
    """Copy a config, and cut it to the tokens of a vocabulary."""
    config = copy.deepcopy(config)
    _renumber_all(distinct([config, config.get_text_config()]), vocabulary)
    return config


def cut_model(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Keep the rows of a vocabulary's tokens in all tensors with one row per token, in place and bit-exact.

    Ties stay ties. The configs, that of generation included, get the new ids. A model that was cut to these tokens does
    not change.

    Raises:
        LightPeftError: the model has another number of tokens, was cut to other tokens, has quantized rows, or depends
            on an id that would change; nothing was cut.
    """
    if vocabulary_of(model) == vocabulary:
        return
    check_whole(model, vocabulary)
    places = rows_by_token(model, vocabulary)
    tensors = {name: tensor_at(model, name) for name in places}
    _check_ids(model, vocabulary, places)
    quantized = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    require(not quantized, f"{', '.join(quantized[:1])} is quantized, so its rows cannot be cut; {KEEP_ALL}")
    rows: dict[int, Tensor] = {}  # one entry for tied tensors
    for name, tensor in tensors.items():
        if id(tensor) not in rows:
            rows[id(tensor)] = match_type(tensor, vocabulary.rows(tensor.detach(), places[name]))
        owner, _, leaf = name.rpartition(".")
        _set_rows(model.get_submodule(owner), leaf, rows[id(tensor)], vocabulary)
    _set_ids(model, vocabulary)
    _renumber_all(configs_of(model), vocabulary)
    _renumber_generation(model, vocabulary)
    model.light_vocabulary = _Cut(vocabulary, _count_removed(tensors, places, vocabulary))


def check_whole(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Check that a model has all tokens that a vocabulary was selected from."""
    size, earlier = getattr(model.config.get_text_config(), "vocab_size", None), vocabulary_of(model)
    require(earlier is None, "the vocabulary of this model was cut to other tokens before; give the uncut base")
    other = f"the base has {size} tokens, and the tokens to keep were selected from {vocabulary.size}"
    require(size == vocabulary.size, f"{other}; give the base that they were selected for")


def rows_by_token(model: PreTrainedModel, vocabulary: Vocabulary) -> dict[str, int]:
    """Find the parameters and buffers with one entry per token: name -> dimension of the tokens.

    Tied ones have an entry for each of their names. The model is made for both numbers of tokens, without storage, and
    tensors whose shapes differ are found, whatever their names.

    Raises:
        LightPeftError: there are none, or one depends on the number of tokens in another way.
    """
    whole, cut = (shapes_of(type(model), config) for config in (model.config, cut_config(model.config, vocabulary)))
    places = {}
    for name in whole.keys() & cut.keys():
        differing = [dim for dim, sizes in enumerate(zip(whole[name], cut[name], strict=True)) if len(set(sizes)) > 1]
        if differing:
            plain = [whole[name][dim] for dim in differing] == [vocabulary.size]
            require(plain, f"{name} cannot be cut: its shape depends on the tokens in an unknown way; {KEEP_ALL}")
            places[name] = differing[0]
    same = len(vocabulary) == vocabulary.size
    require(places or same, f"{model.config.model_type} has no rows per token to cut; {KEEP_ALL}")
    return places


# Tensors


def _set_rows(module: nn.Module, leaf: str, rows: Tensor, vocabulary: Vocabulary) -> None:
    setattr(module, leaf, rows)
    for size in ("num_embeddings", "out_features"):
        if getattr(module, size, None) == vocabulary.size:
            setattr(module, size, len(vocabulary))


def _count_removed(tensors: dict[str, Tensor], places: dict[str, int], vocabulary: Vocabulary) -> int:
    """Count the parameters in removed rows; tied ones count once, and so do tensors that were loaded without them."""
    gone, seen, lost = vocabulary.size - len(vocabulary), set(), 0
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter) and id(tensor) not in seen:
            seen.add(id(tensor))
            lost += gone * tensor.numel() // tensor.shape[places[name]]
    return lost


# Ids


def _token_settings(settings: Any) -> dict[str, int | list[int]]:
    """Return the settings of a config, or of a module, that are token ids or lists of token ids."""
    found = {name: value for name, value in vars(settings).items() if name.endswith("_token_id")}
    return {name: value for name, value in found.items() if isinstance(value, (int, list)) and value is not False}


def _renumber(value: Any, vocabulary: Vocabulary) -> Any:
    """Renumber an id, or a list of ids, for the small vocabulary; values that are no token ids do not change."""
    if isinstance(value, list):
        return [_renumber(each, vocabulary) for each in value if each in vocabulary.new_ids]
    return vocabulary.new_ids.get(value) if 0 <= value < vocabulary.size else value


def _check_ids(model: PreTrainedModel, vocabulary: Vocabulary, places: dict[str, int]) -> None:
    """Refuse models that count positions from an id that would change, and generation configs that contain tokens."""
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(module, nn.Embedding) and padding is not None and f"{name}.weight" not in places:
            fixed = _renumber(padding, vocabulary) == padding
            require(fixed, f"{name} counts positions from the padding token's id, which would change; {KEEP_ALL}")
    generation = getattr(model, "generation_config", None)
    named = [name for name in _BY_TOKENS if getattr(generation, name, None)]
    require(not named, f"the generation config has {', '.join(named)}, which contain tokens; {KEEP_ALL}")


def _set_ids(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Update the attributes of modules that copy token settings of the config."""
    for module in model.modules():
        if getattr(module, "vocab_size", None) == vocabulary.size:
            module.vocab_size = len(vocabulary)
        padding = vars(module).get("padding_idx")
        own = {} if padding is None else {"padding_idx": padding}
        for name, value in {**own, **_token_settings(module)}.items():
            setattr(module, name, _renumber(value, vocabulary))


def _renumber_all(configs: Iterable[PretrainedConfig], vocabulary: Vocabulary) -> None:
    for config in configs:
        if getattr(config, "vocab_size", None) == vocabulary.size:
            config.vocab_size = len(vocabulary)
        for name, value in _token_settings(config).items():
            setattr(config, name, _renumber(value, vocabulary))


def _renumber_generation(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    for name, value in _token_settings(settings).items():
        setattr(settings, name, _renumber(value, vocabulary))
    for name in _NEVER_WRITTEN:
        listed: list[int] | None = getattr(settings, name, None)
        if listed is not None:
            setattr(settings, name, _renumber(listed, vocabulary))
