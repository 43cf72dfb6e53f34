"""Small random models of the same architecture as a live one, and random inputs for them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel

from lightpeft.compat.transformers import attention_of, forget_attention
from lightpeft.errors import LightPeftError, require
from lightpeft.files.foreign import parsing

_SKELETON_LAYERS = 2
_VOCABULARY = 256
_DEPTH_KEYS = (
    "num_hidden_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
)
_NEURONS = 128
_SHRUNK_WIDTH_KEYS = (
    "intermediate_size",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "ffn_hidden_size",
    "n_inner",
    "d_ff",
    "dff",
)
_ROWS = 3
_LENGTH = 9
_SPREAD = 1.5
"""Standard deviation of random weights times the root of their inputs: large enough that attention is far from even."""


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model of the same class with two layers, few neurons and tokens, and random float32 weights on the CPU.

    Its attention is as wide as that of `model`, whose weights are neither copied nor read.

    Raises:
        LightPeftError: the config has no known key of the number of layers, or no model can be made from it.
    """
    config = skeleton_config(model.config)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        with parsing(f"a small {type(model).__name__} cannot be made"):
            small = type(model)(config).float()
        with torch.no_grad():
            for parameter in small.parameters():
                _randomize(parameter, generator)
    return small.eval()


def skeleton_config(config: PretrainedConfig) -> Any:
    """Copy a config with fewer layers (lists with one entry per layer are cut), neurons and tokens.

    Raises:
        LightPeftError: the config has no known key of the number of layers.
    """
    small: Any = copy.deepcopy(config)
    depths = {key: value for key in _DEPTH_KEYS if type(value := getattr(config, key, None)) is int}
    require(depths, f"{type(config).__name__} has no known key for the number of layers")
    for key, value in list(vars(small).items()):
        if isinstance(value, list | tuple) and "layer" in key and len(value) in depths.values():
            setattr(small, key, value[:_SKELETON_LAYERS])
    for key, value in depths.items():
        try:
            setattr(small, key, min(value, _SKELETON_LAYERS))
        except NotImplementedError as error:  # a computed property that cannot be set
            raise LightPeftError(f"{type(config).__name__}.{key} cannot be set to fewer layers") from error
    for key in _SHRUNK_WIDTH_KEYS:
        if type(value := getattr(config, key, None)) is int:
            setattr(small, key, min(value, _NEURONS))
    if type(getattr(config, "vocab_size", None)) is int:
        small.vocab_size = min(config.vocab_size, _VOCABULARY)
        small.pad_token_id = getattr(config, "pad_token_id", None) or 0  # classifiers of padded rows need one
        _fit_token_ids(small)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    if attention_of(config) not in ("sdpa", "eager"):
        forget_attention(small)  # backends that need an accelerator are replaced by the default of the class
    return small


def _fit_token_ids(config: Any) -> None:
    """Renumber special tokens beyond the vocabulary to distinct ids at its start."""
    for number, (key, value) in enumerate(sorted(vars(config).items())):
        if key.endswith("_token_id") and isinstance(value, int | list):
            ids = value if isinstance(value, list) else [value]
            if any(token >= config.vocab_size for token in ids):
                setattr(config, key, number % max(config.vocab_size // 4, 1))


def _randomize(parameter: nn.Parameter, generator: torch.Generator) -> None:
    if parameter.dim() > 1:
        parameter.normal_(0.0, _SPREAD / max(parameter[:1].numel(), 1) ** 0.5, generator=generator)
    else:
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def random_inputs(model: PreTrainedModel, padding: str = "right") -> dict[str, Tensor]:
    """Make random token ids (all rows but the first padded), images or raw sound, the same at every call.

    Raises:
        LightPeftError: the model needs other inputs.
    """
    config, name = model.config, model.main_input_name
    needed = {"input_ids": "vocab_size", "pixel_values": "image_size"}.get(name)
    says = needed is None or hasattr(config, needed)
    require(says, f"{type(config).__name__} has no {needed}, which is needed for random inputs")
    generator = torch.Generator().manual_seed(1)
    if name == "input_ids":
        inputs = _token_inputs(config, padding, generator)
    elif name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        inputs = {name: torch.randn(_ROWS, config.num_channels, height, width, generator=generator)}
    elif name == "input_values":
        inputs = {name: torch.randn(_ROWS, 4000, generator=generator)}
    else:
        raise LightPeftError(f"{type(model).__name__} needs the input {name}, for which there are no random values")
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = _tokens(config, _LENGTH - 2, generator)
    accepted = inspect.signature(model.forward).parameters
    return {key: value for key, value in inputs.items() if key == name or key in accepted}


def _token_inputs(config: Any, padding: str, generator: torch.Generator) -> dict[str, Tensor]:
    ids, mask = _tokens(config, _LENGTH, generator), torch.ones(_ROWS, _LENGTH, dtype=torch.long)
    for row in range(1, _ROWS):
        mask[row, slice(_LENGTH - 2 * row, None) if padding == "right" else slice(0, 2 * row)] = 0
    pad = config.pad_token_id if isinstance(getattr(config, "pad_token_id", None), int) else 0
    return {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}


def _tokens(config: Any, length: int, generator: torch.Generator) -> Tensor:
    """Draw token ids from the upper half of the vocabulary, which has no special tokens."""
    return torch.randint(config.vocab_size // 2, config.vocab_size, (_ROWS, length), generator=generator)


def run(model: nn.Module, inputs: dict[str, Tensor], handles: Sequence[RemovableHandle] = ()) -> Tensor:
    """Compute the first output of a model without gradients, and remove the hooks afterwards.

    Raises:
        LightPeftError: the model fails on these inputs.
    """
    try:
        with parsing(f"{type(model).__name__} fails on random inputs"), torch.no_grad():
            return cast(Tensor, model(**inputs)[0])
    finally:
        for handle in handles:
            handle.remove()
