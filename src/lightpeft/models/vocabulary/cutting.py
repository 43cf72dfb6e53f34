"""A model with the rows of some tokens alone: input embeddings, a tied or untied head, its biases, and its settings."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lightpeft.errors import require
from lightpeft.models.tables import configs_of, distinct, like, shapes_of, tensor_at
from lightpeft.models.vocabulary.kept import Vocabulary

_NEVER_WRITTEN = ("suppress_tokens", "begin_suppress_tokens")
"""Lists of tokens in a generation config; those that are gone are never written anyway."""
_BY_TOKENS = ("bad_words_ids", "force_words_ids", "forced_decoder_ids", "sequence_bias")
"""What else a generation config says of tokens."""
_INSTEAD = "keep all its tokens (of a run, light.remove.vocabulary: keep)"


@dataclass(frozen=True)
class _Cut:
    """What a model remembers."""

    vocabulary: Vocabulary
    parameters: int
    """That went."""


def vocabulary_of(model: nn.Module) -> Vocabulary | None:
    """Which tokens of its base a transformers model has; None: it is as it was loaded."""
    cut: _Cut | None = getattr(model, "light_vocabulary", None)
    return None if cut is None else cut.vocabulary


def cut_parameters(model: nn.Module) -> int:
    """Parameters that a transformers model has lost with its tokens."""
    cut: _Cut | None = getattr(model, "light_vocabulary", None)
    return 0 if cut is None else cut.parameters


def config_tokens(config: PretrainedConfig) -> set[int]:
    """Ids of the tokens that a config names, which have to stay."""
    text = config.get_text_config()
    values = (value for each in (config, text) for value in _token_settings(each).values())
    named = {number for value in values for number in (value if isinstance(value, list) else [value])}
    return {number for number in named if 0 <= number < text.vocab_size}


def cut_config(config: PretrainedConfig, vocabulary: Vocabulary) -> PretrainedConfig:
    """A copy of a config with the tokens of a vocabulary alone."""
    config = copy.deepcopy(config)
    _renumber_all(distinct([config, config.get_text_config()]), vocabulary)
    return config


def cut_model(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Keep the rows of a vocabulary's tokens of all that has one row a token, in place; what is kept is bit-equal.

    Ties stay ties. The configs, that of generation included, get the new ids. Nothing is done to a model that has these
    tokens alone.

    Raises:
        LightPeftError: the model has another number of tokens, was cut before to others, or has rows that are
            quantised, or something that depends on an id that changes; nothing was cut.
    """
    if vocabulary_of(model) == vocabulary:
        return
    check_whole(model, vocabulary)
    places = rows_by_token(model, vocabulary)
    tensors = {name: tensor_at(model, name) for name in places}
    _check_ids(model, vocabulary, places)
    quantised = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    require(not quantised, f"{', '.join(quantised[:1])} is quantised, and its rows cannot be cut; {_INSTEAD}")
    rows: dict[int, Tensor] = {}  # of tied tensors, once
    for name, tensor in tensors.items():
        if id(tensor) not in rows:
            rows[id(tensor)] = like(tensor, vocabulary.rows(tensor.detach(), places[name]))
        owner, _, leaf = name.rpartition(".")
        _set(model.get_submodule(owner), leaf, rows[id(tensor)], vocabulary)
    _set_ids(model, vocabulary)
    _renumber_all(configs_of(model), vocabulary)
    _renumber_generation(model, vocabulary)
    model.light_vocabulary = _Cut(vocabulary, _lost(tensors, places, vocabulary))


def check_whole(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Refuse a model that does not have all the tokens that a vocabulary is a part of."""
    size, earlier = getattr(model.config.get_text_config(), "vocab_size", None), vocabulary_of(model)
    require(earlier is None, "the vocabulary of this model was cut before, to other tokens; give the base as it was")
    other = f"the base has rows of {size} tokens, and the tokens to keep were chosen among {vocabulary.size}"
    require(size == vocabulary.size, f"{other}; give the base that they were chosen for")


def rows_by_token(model: PreTrainedModel, vocabulary: Vocabulary) -> dict[str, int]:
    """Every parameter and buffer with an entry a token, by name, with the dimension that has them.

    Tied ones are there under each of their names. The model is made for both numbers of tokens, without storage, and
    what has other shapes is one: no name is looked up.

    Raises:
        LightPeftError: there is none, or it depends on the number of tokens in another way.
    """
    whole, cut = (shapes_of(type(model), config) for config in (model.config, cut_config(model.config, vocabulary)))
    places = {}
    for name in whole.keys() & cut.keys():
        differing = [dim for dim, sizes in enumerate(zip(whole[name], cut[name], strict=True)) if len(set(sizes)) > 1]
        if differing:
            plain = [whole[name][dim] for dim in differing] == [vocabulary.size]
            require(plain, f"{name} depends on the number of tokens in a way that cannot be cut; {_INSTEAD}")
            places[name] = differing[0]
    same = len(vocabulary) == vocabulary.size
    require(places or same, f"{model.config.model_type} has no rows by token that could be cut; {_INSTEAD}")
    return places


# Tensors


def _set(module: nn.Module, leaf: str, rows: Tensor, vocabulary: Vocabulary) -> None:
    setattr(module, leaf, rows)
    for size in ("num_embeddings", "out_features"):
        if getattr(module, size, None) == vocabulary.size:
            setattr(module, size, len(vocabulary))


def _lost(tensors: dict[str, Tensor], places: dict[str, int], vocabulary: Vocabulary) -> int:
    """Parameters in the rows that went; tied ones count once, and those that were read without these rows as well."""
    gone, seen, lost = vocabulary.size - len(vocabulary), set(), 0
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter) and id(tensor) not in seen:
            seen.add(id(tensor))
            lost += gone * tensor.numel() // tensor.shape[places[name]]
    return lost


# Ids


def _token_settings(settings: Any) -> dict[str, int | list[int]]:
    """What in a config, or in a module, is a token's id or a list of some."""
    found = {name: value for name, value in vars(settings).items() if name.endswith("_token_id")}
    return {name: value for name, value in found.items() if isinstance(value, (int, list)) and value is not False}


def _new(value: Any, vocabulary: Vocabulary) -> Any:
    """An id, or a list of ids, in the small vocabulary. What is no token at all stays what it is."""
    if isinstance(value, list):
        return [_new(each, vocabulary) for each in value if each in vocabulary.new_ids]
    return vocabulary.new_ids.get(value) if 0 <= value < vocabulary.size else value


def _check_ids(model: PreTrainedModel, vocabulary: Vocabulary, places: dict[str, int]) -> None:
    """Refuse a model that counts positions from an id that changes, or whose generation config is about tokens."""
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(module, nn.Embedding) and padding is not None and f"{name}.weight" not in places:
            fixed = _new(padding, vocabulary) == padding
            require(fixed, f"{name} counts from the id of the padding token, which would change; {_INSTEAD}")
    generation = getattr(model, "generation_config", None)
    named = [name for name in _BY_TOKENS if getattr(generation, name, None)]
    require(not named, f"the generation config has {', '.join(named)}, which are about tokens; {_INSTEAD}")


def _set_ids(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Set what modules keep of the config for themselves."""
    for module in model.modules():
        if getattr(module, "vocab_size", None) == vocabulary.size:
            module.vocab_size = len(vocabulary)
        padding = vars(module).get("padding_idx")
        own = {} if padding is None else {"padding_idx": padding}
        for name, value in {**own, **_token_settings(module)}.items():
            setattr(module, name, _new(value, vocabulary))


def _renumber_all(configs: Iterable[PretrainedConfig], vocabulary: Vocabulary) -> None:
    for config in configs:
        if getattr(config, "vocab_size", None) == vocabulary.size:
            config.vocab_size = len(vocabulary)
        for name, value in _token_settings(config).items():
            setattr(config, name, _new(value, vocabulary))


def _renumber_generation(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    for name, value in _token_settings(settings).items():
        setattr(settings, name, _new(value, vocabulary))
    for name in _NEVER_WRITTEN:
        listed: list[int] | None = getattr(settings, name, None)
        if listed is not None:
            setattr(settings, name, _new(listed, vocabulary))
