"""From names and folders to a live model, its tokenizer, and the fingerprint of its base weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lightpeft.compat.transformers import forget_renaming, has_adapter
from lightpeft.config import ModelConfig
from lightpeft.config.validation import shown
from lightpeft.errors import LightPeftError, require
from lightpeft.files.foreign import check_config, check_weights, parsing
from lightpeft.machine import processes
from lightpeft.models import hub
from lightpeft.models.families.registry import check_not_refused
from lightpeft.models.linears.bitsandbytes import prepare_quantised
from lightpeft.models.on_disk import weights_on_disk
from lightpeft.models.task_heads import CAUSAL_LM, TaskHead

_QUANTISED: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}
CUTTABLE = "bitsandbytes"
"""The quantisation method, as transformers names it, whose weights can be cut."""


def quiet_libraries() -> None:
    """Keep load reports, bars and notices of deprecation of the libraries below off the screen of this process."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of every cast
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


@contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers' reports off the screen inside the block: weights that an adapter brings, it calls missing."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@dataclass
class LoadedModel:
    """A dense foundation model with what later stages need to know of how it was loaded."""

    model: PreTrainedModel
    new_modules: list[str]
    """Modules that the checkpoint has no weights for (the task head); they train and travel with the adapter."""
    head: TaskHead
    """What the model was loaded with."""


def load_model(
    config: ModelConfig, head: TaskHead, labels: Sequence[str] = (), *, to_prune: bool = True
) -> LoadedModel:
    """Load the foundation model with the head of the task.

    Args:
        labels: names of the classes in order.
        to_prune: refuse what cannot be pruned; off for models that are measured only.

    Raises:
        LightPeftError: no such model, or one that is to be pruned and cannot be.
    """
    alone = "model.low_memory leaves weights on disk for one process; start one, or switch it off"
    require(not config.low_memory or processes().num_processes == 1, alone)
    hf_config, options = _configured(config, head, labels, to_prune)
    if to_prune:
        _check_quantisation(config, hf_config)
    if config.quantization:
        options["quantization_config"] = BitsAndBytesConfig(**_QUANTISED[config.quantization])
    architecture = None if head.architectures is None else head.architectures.get(type(hf_config), None)
    names = None if architecture is None else base_names(architecture)
    with _opening(config), weights_on_disk() if config.low_memory else nullcontext():
        model, info = head.auto.from_pretrained(
            config.name,
            config=hf_config,
            dtype=config.dtype,
            output_loading_info=True,
            key_mapping=names,
            **check_checkpoint(config, weights=True),
            **options,
        )
    if getattr(model.config, "quantization_config", None) is not None and config.gguf_file:
        del model.config.quantization_config  # the weights were dequantised on loading
    remember_origin(model, config)
    keep_own_names(model, names)
    prepare_quantised(model)
    return LoadedModel(model, sorted({_top_module(model, key) for key in info["missing_keys"]}), head)


def untrained_model(
    config: ModelConfig, head: TaskHead, labels: Sequence[str] = (), *, to_prune: bool = True
) -> LoadedModel:
    """The same model as its configuration alone tells of it, on the meta device: no weight is read.

    Args:
        to_prune: as of `load_model`.

    Raises:
        LightPeftError: no such model, or one that cannot be pruned.
    """
    hf_config, options = _configured(config, head, labels, to_prune)
    dtype = getattr(hf_config, "dtype", None) if config.dtype == "auto" else getattr(torch, config.dtype)
    with _opening(config), torch.device("meta"):
        model = head.auto.from_config(
            hf_config, dtype=dtype or torch.float32, trust_remote_code=config.trust_remote_code, **options
        )
    return LoadedModel(model, [] if head == CAUSAL_LM else _heads(model), head)


def supports_checkpointing(
    config: ModelConfig, head: TaskHead, labels: Sequence[str] = (), *, to_prune: bool = True
) -> bool:
    """Whether a model can compute activations again in the backward pass (gradient checkpointing); no weight is read.

    Raises:
        LightPeftError: as of `untrained_model`.
    """
    return bool(untrained_model(config, head, labels, to_prune=to_prune).model.supports_gradient_checkpointing)


def _configured(
    config: ModelConfig, head: TaskHead, labels: Sequence[str], to_prune: bool = True
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The model's configuration with what the head sets in it, and what transformers is told besides to make it."""
    hf_config = load_model_config(config)
    if to_prune:
        check_not_refused(hf_config.model_type)
    head.configure(hf_config, labels)
    return hf_config, {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}


def _heads(model: PreTrainedModel) -> list[str]:
    """What a model has beside its base."""
    beside = (name for name, module in model.named_children() if name != model.base_model_prefix)
    return sorted(name for name in beside if any(True for _ in model.get_submodule(name).parameters()))


def remember_origin(model: PreTrainedModel, config: ModelConfig) -> None:
    """Note on a model what it was read from, as far as its own configuration does not say it."""
    model.light_gguf_file = config.gguf_file
    model.light_revision = hub.commit_of(config.name, config.gguf_file or "config.json", config.revision)


def base_names(architecture: type[PreTrainedModel]) -> dict[str, str] | None:
    """`key_mapping` for `from_pretrained`, where a head calls its base otherwise than the family's checkpoints do.

    transformers' question answering heads of Llama and its kin do ("transformer" for "model"). Without it they would
    load no weight of the base.
    """
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(architecture.config_class, None)
    if causal is None or causal.base_model_prefix == architecture.base_model_prefix:
        return None
    return {rf"^{causal.base_model_prefix}\.": f"{architecture.base_model_prefix}."}


def keep_own_names(model: PreTrainedModel, mapping: Mapping[str, str] | None) -> None:
    """Let a model that was loaded with `base_names` be saved under its own names, so that it can be loaded plainly."""
    if mapping:
        forget_renaming(model, mapping)


def _check_quantisation(config: ModelConfig, hf_config: PretrainedConfig) -> None:
    """Refuse weights that cannot be cut; those of a GGUF file are dequantised when they are loaded."""
    quantised = getattr(hf_config, "quantization_config", None)
    if quantised is None or config.gguf_file:
        return
    method = quantisation_method(quantised if isinstance(quantised, dict) else quantised.to_dict())
    require(
        method == CUTTABLE,
        f"model {config.name} is quantised ({method}), which cannot be cut; give the base in float32, bfloat16 or "
        f"float16, or quantised by {CUTTABLE}",
    )
    already = f"model {config.name} is quantised already ({method})"
    require(config.quantization is None, f"{already}; leave model.quantization unset")


def quantisation_method(settings: Mapping[str, Any]) -> str:
    """The method, as transformers names it, in a quantisation's settings."""
    return str(settings.get("quant_method", "unknown method")).rpartition(".")[2].lower()


def load_model_config(config: ModelConfig) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        LightPeftError: there is no such model, or its files are not what they should be.
    """
    with _opening(config):
        return AutoConfig.from_pretrained(config.name, **check_checkpoint(config))


def load_tokenizer(config: ModelConfig, own: PretrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Args:
        own: the model's configuration, where transformers would not find it; None: it does.

    Raises:
        LightPeftError: there is none, or its files are not what they should be.
    """
    with _opening(config):
        options = check_checkpoint(config)
        tokenizer = AutoTokenizer.from_pretrained(config.name, **({} if own is None else {"config": own}), **options)
    _check_tokenizer(tokenizer, config.name)
    return tokenizer


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse settings of a tokenizer that transformers takes as they come, and that fail where they are used."""
    longest, inputs = tokenizer.model_max_length, tokenizer.model_input_names
    fits = isinstance(longest, (int, float)) and not isinstance(longest, bool) and longest >= 1
    says = f"the tokenizer of model {name} says"
    require(fits, f"{says} model_max_length is {shown(longest)}, which is no number of tokens; mend its files")
    known = isinstance(inputs, (list, tuple)) and "input_ids" in inputs and all(isinstance(n, str) for n in inputs)
    require(known, f"{says} model_input_names is {shown(inputs)}; it must be a list of names with input_ids")


def check_checkpoint(config: ModelConfig, weights: bool = False) -> dict[str, Any]:
    """Look at a model's files before transformers makes anything of them.

    Args:
        weights: are to be read.

    Returns:
        How any `from_pretrained` of transformers is to be called for it.

    Raises:
        LightPeftError: the folder is not there, or asks for code from the hub.
        Exception: what transformers raises for a configuration that is missing or damaged.
    """
    require(config.name, "model.name is empty; give a hub name or a local folder")
    folder = Path(config.name).expanduser()
    looks_local = config.name.startswith((".", "/", "~")) or config.name.count("/") > 1
    require(folder.is_dir() or not looks_local, f"model folder {config.name} does not exist")
    hub.look_for(config.name)
    place = {"revision": config.revision or "main"}
    if config.gguf_file is None:
        settings, _ = PretrainedConfig.get_config_dict(config.name, **place)
        check_config(settings, f"model {config.name}")
        # transformers would load the model that the adapter names and put the adapter into it
        both = has_adapter(config.name, **place)
        require(not both, f"model {config.name} has a PEFT adapter beside it; give a folder of the model alone")
    options = {**place, "gguf_file": config.gguf_file, "trust_remote_code": config.trust_remote_code}
    if not weights:
        return options
    if folder.is_dir() and config.gguf_file is None:
        check_weights(folder, config.allow_pickle)
    return {**options, "weights_only": True, "use_safetensors": None if config.allow_pickle else True}


def _top_module(model: PreTrainedModel, key: str) -> str:
    """The module to train for a missing weight: the head as a whole, or the nearest module inside the base."""
    prefix = f"{model.base_model_prefix}."
    if not key.startswith(prefix):
        return key.partition(".")[0]
    return prefix + key.removeprefix(prefix).partition(".")[0]


@contextmanager
def _opening(config: ModelConfig) -> Iterator[None]:
    """Say in one line why a model cannot be loaded, and which switch it lacks."""
    try:
        with parsing(f"model {config.name} cannot be loaded"):
            yield
    except LightPeftError as error:
        if error.__cause__ is None:
            raise
        if "trust_remote_code" in str(error.__cause__) and not config.trust_remote_code:
            needs = "needs Python code that comes with it; if you trust its author, say so: trust_remote_code"
            raise LightPeftError(f"model {config.name} {needs}") from error
        if "safetensors" in str(error.__cause__) and not config.allow_pickle:
            raise LightPeftError(f"{error}; for pickled weights of an author you trust: allow_pickle") from error
        raise
