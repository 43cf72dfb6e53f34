"""Loading of models and configurations from hub names and local folders."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from lightpeft.compat.transformers import forget_quantization, forget_renaming, has_adapter, unpacking_gguf
from lightpeft.config import ModelConfig
from lightpeft.config.places import check_model_folder, local_path
from lightpeft.errors import LightPeftError, require
from lightpeft.files.foreign import check_config, check_weights, parsing
from lightpeft.machine import processes
from lightpeft.models import hub
from lightpeft.models.families.family_table import check_not_refused
from lightpeft.models.linears.bitsandbytes import prepare_quantized
from lightpeft.models.on_disk import weights_on_disk
from lightpeft.models.repositories import Token
from lightpeft.models.task_heads import CAUSAL_LM, TaskHead

_QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}
_ARCHITECTURE = re.compile(r"(?:architecture|model type) [`'\"]?([\w.-]+)[`'\"]?")
"""How transformers says that it knows no model for the architecture of a GGUF file."""
CUTTABLE = "bitsandbytes"
"""Quantization method, as transformers names it, whose weights can be cut."""


def quiet_libraries() -> None:
    """Silence load reports, progress bars and deprecation warnings of libraries in this process."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of every cast
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' load reports inside the block, because they call weights of an adapter missing."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@dataclass
class LoadedModel:
    """A dense foundation model, with facts of its loading for later stages."""

    model: PreTrainedModel
    new_modules: list[str]
    """Modules without weights in the checkpoint (the task head); they train and are saved with the adapter."""
    head: TaskHead
    """Task head that the model was loaded with."""


def load_model(
    config: ModelConfig, head: TaskHead, labels: Sequence[str] = (), *, to_prune: bool = True
) -> LoadedModel:
    """Load the foundation model with the head of the task.

    Args:
        labels: names of the classes in order.
        to_prune: refuse models that cannot be pruned.

    Raises:
        LightPeftError: there is no such model, or it cannot be pruned.
    """
    alone = "model.low_memory works in a single process only; start one process, or switch it off"
    require(not config.low_memory or processes().num_processes == 1, alone)
    hf_config, options = _load_configured(config, head, labels, to_prune)
    if to_prune:
        _check_quantization(config, hf_config)
    if config.quantization:
        options["quantization_config"] = BitsAndBytesConfig(**_QUANTIZED[config.quantization])
    if config.gguf_file is not None:
        options |= unpacking_gguf()
    architecture = None if head.architectures is None else head.architectures.get(type(hf_config), None)
    names = None if architecture is None else base_names(architecture)
    with explain_errors(config), weights_on_disk() if config.low_memory else nullcontext():
        model, info = head.auto.from_pretrained(
            config.name,
            config=hf_config,
            dtype=config.dtype,
            output_loading_info=True,
            key_mapping=names,
            **check_checkpoint(config, weights=True),
            **options,
        )
    if config.gguf_file is not None:
        forget_quantization(model)
    record_origin(model, config)
    forget_renaming(model, names)
    prepare_quantized(model)
    return LoadedModel(model, sorted({_top_module(model, key) for key in info["missing_keys"]}), head)


def untrained_model(
    config: ModelConfig, head: TaskHead, labels: Sequence[str] = (), *, to_prune: bool = True
) -> LoadedModel:
    """Make a model with the head of the task from its configuration, on the meta device, without reading weights.

    Args:
        labels: names of the classes in order.
        to_prune: refuse models that cannot be pruned.

    Raises:
        LightPeftError: there is no such model, or it cannot be pruned.
    """
    hf_config, options = _load_configured(config, head, labels, to_prune)
    dtype = getattr(hf_config, "dtype", None) if config.dtype == "auto" else getattr(torch, config.dtype)
    with explain_errors(config), torch.device("meta"):
        model = head.auto.from_config(
            hf_config, dtype=dtype or torch.float32, trust_remote_code=config.trust_remote_code, **options
        )
    return LoadedModel(model, [] if head == CAUSAL_LM else _head_modules(model), head)


def supports_checkpointing(
    config: ModelConfig, head: TaskHead, labels: Sequence[str] = (), *, to_prune: bool = True
) -> bool:
    """Return whether a model supports gradient checkpointing, without reading weights.

    Raises:
        LightPeftError: there is no such model, or it cannot be pruned.
    """
    return bool(untrained_model(config, head, labels, to_prune=to_prune).model.supports_gradient_checkpointing)


def _load_configured(
    config: ModelConfig, head: TaskHead, labels: Sequence[str], to_prune: bool = True
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Load the model's configuration, let the head set its outputs, and return it with options of `from_pretrained`."""
    hf_config = load_model_config(config)
    if to_prune:
        check_not_refused(hf_config.model_type)
    head.configure(hf_config, labels)
    return hf_config, {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}


def _head_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules with parameters beside the base."""
    beside = (name for name, module in model.named_children() if name != model.base_model_prefix)
    return sorted(name for name in beside if any(True for _ in model.get_submodule(name).parameters()))


def record_origin(model: PreTrainedModel, config: ModelConfig) -> None:
    """Record the GGUF file and the commit that a model was read from, which its configuration does not have."""
    model.light_gguf_file = config.gguf_file
    model.light_revision = hub.commit_of(config.name, config.gguf_file or "config.json", config.revision)


def base_names(architecture: type[PreTrainedModel]) -> dict[str, str] | None:
    """Return the `key_mapping` of `from_pretrained` for heads that name their base unlike the family's checkpoints.

    These are transformers' question answering heads of Llama and related families ("transformer" for "model"). Without
    a mapping they would load no weight of the base.
    """
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(architecture.config_class, None)
    if causal is None or causal.base_model_prefix == architecture.base_model_prefix:
        return None
    return {rf"^{causal.base_model_prefix}\.": f"{architecture.base_model_prefix}."}


def _check_quantization(config: ModelConfig, hf_config: PretrainedConfig) -> None:
    """Refuse quantized weights that cannot be cut; loading dequantizes those of a GGUF file."""
    quantized = getattr(hf_config, "quantization_config", None)
    if quantized is None or config.gguf_file:
        return
    method = quantization_method(quantized if isinstance(quantized, dict) else quantized.to_dict())
    require(
        method == CUTTABLE,
        f"model {config.name} is quantized with {method}, which cannot be pruned; give the base in float32, bfloat16 "
        f"or float16, or quantized with {CUTTABLE}",
    )
    already = f"model {config.name} is already quantized ({method})"
    require(config.quantization is None, f"{already}; leave model.quantization unset")


def quantization_method(settings: Mapping[str, Any]) -> str:
    """Return the quantization method in quantization settings, as transformers names it."""
    return str(settings.get("quant_method", "unknown method")).rpartition(".")[2].lower()


def load_model_config(config: ModelConfig, token: Token = None) -> PretrainedConfig:
    """Load the model's configuration.

    Args:
        token: access token for the hub; None: that of the logged-in account, if any.

    Raises:
        LightPeftError: there is no such model, or its files are damaged.
    """
    with explain_errors(config):
        return AutoConfig.from_pretrained(config.name, **check_checkpoint(config, token=token))


def check_checkpoint(config: ModelConfig, weights: bool = False, token: Token = None) -> dict[str, Any]:
    """Check a model's files before transformers reads them.

    Args:
        weights: whether weights will be read.
        token: access token for the hub; None: that of the logged-in account, if any.

    Returns:
        Arguments for transformers' `from_pretrained`.

    Raises:
        LightPeftError: the folder does not exist, or its configuration asks for code from the hub.
        Exception: transformers cannot read the configuration.
    """
    require(config.name, "model.name is empty; give a hub name or a local folder")
    check_model_folder(config.name)
    folder = local_path(config.name)
    hub.go_offline_if_unreachable(config.name)
    place: dict[str, Any] = {"revision": config.revision or "main", "token": token}
    if config.gguf_file is None:
        settings, _ = PretrainedConfig.get_config_dict(config.name, **place)
        check_config(settings, f"model {config.name}")
        # transformers would load the model that the adapter names and put the adapter into it
        both = has_adapter(config.name, **place)
        require(not both, f"model {config.name} has a PEFT adapter in its folder; give a folder with the model only")
    options = {**place, "gguf_file": config.gguf_file, "trust_remote_code": config.trust_remote_code}
    if not weights:
        return options
    if folder.is_dir() and config.gguf_file is None:
        check_weights(folder, config.allow_pickle)
    return {**options, "weights_only": True, "use_safetensors": None if config.allow_pickle else True}


def _top_module(model: PreTrainedModel, key: str) -> str:
    """Return the module to train for a missing weight: the whole head, or the top module inside the base."""
    prefix = f"{model.base_model_prefix}."
    if not key.startswith(prefix):
        return key.partition(".")[0]
    return prefix + key.removeprefix(prefix).partition(".")[0]


@contextmanager
def explain_errors(config: ModelConfig) -> Iterator[None]:
    """Turn errors of loading a model into one line, which names the switch that may be missing."""
    try:
        missing = "" if os.path.isdir(config.name) else f"there is no folder {config.name}, and "  # noqa: PTH112 (never raises)
        with parsing(f"{missing}model {config.name} cannot be loaded"):
            yield
    except LightPeftError as error:
        if error.__cause__ is None:
            raise
        if "trust_remote_code" in str(error.__cause__) and not config.trust_remote_code:
            needs = "needs Python code from its repository; set trust_remote_code if you trust its author"
            raise LightPeftError(f"model {config.name} {needs}") from error
        unknown = _ARCHITECTURE.search(str(error.__cause__)) if config.gguf_file is not None else None
        if unknown is not None:
            cannot = f'model.gguf_file {config.gguf_file} has the architecture "{unknown[1]}", which cannot be trained'
            raise LightPeftError(f"{cannot}; give the base as safetensors, or a GGUF file of another family") from error
        if "safetensors" in str(error.__cause__) and not config.allow_pickle:
            raise LightPeftError(f"{error}; set allow_pickle for pickled weights if you trust their author") from error
        raise
