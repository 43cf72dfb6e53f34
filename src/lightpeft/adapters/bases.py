"""Load the base model that a light model names; nothing else in its description is trusted."""

from __future__ import annotations

from typing import Any, cast

import torch
import transformers
from transformers import PreTrainedModel

from lightpeft.adapters.streaming import Stream
from lightpeft.compat.missing import needed_for
from lightpeft.compat.transformers import apart_from_other_threads, forget_renaming
from lightpeft.config import ModelConfig
from lightpeft.errors import LightPeftError, require
from lightpeft.files.foreign import parsing
from lightpeft.models.loading import base_names, check_checkpoint, quiet_transformers, record_origin
from lightpeft.models.repositories import Token
from lightpeft.saving.description import BaseFacts


def architecture_of(saved: BaseFacts, instead: str) -> type[PreTrainedModel]:
    """Return the transformers class of a saved model's base.

    Args:
        saved: description of the base.
        instead: remedy at the end of the error line.

    Raises:
        LightPeftError: this version of transformers has no such model class.
    """
    with parsing(f"transformers cannot import {saved.architecture}", instead):
        found = getattr(transformers, saved.architecture, None)
    fits = isinstance(found, type) and issubclass(found, PreTrainedModel) and found is not PreTrainedModel
    require(fits, f"this version of transformers has no model class {saved.architecture}; {instead}")
    return cast(type[PreTrainedModel], found)


def load_base(
    saved: BaseFacts,
    model: ModelConfig,
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    stream: Stream | None = None,
    token: Token = None,
) -> tuple[PreTrainedModel, list[str]]:
    """Load the base of a light adapter, dense or through a stream, with the head of the adapter's training.

    Args:
        saved: description of the base in the adapter.
        model: name or folder of the base, and permission to run its code or to read pickled weights.
        dtype: data type of the weights; "auto": as in training.
        attn_implementation: attention backend; None: the default of the base.
        stream: reads tensor by tensor and keeps only what the plan keeps; None: load the dense model.
        token: access token for the hub; None: that of the logged-in account, if any.

    Returns:
        The model, and the names of weights that its checkpoint lacks.

    Raises:
        LightPeftError: the base is missing or damaged, or needs permissions that `model` does not give.
    """
    architecture = architecture_of(saved, "load the base yourself and pass it as base=")
    if stream is not None:
        architecture = stream.loader(architecture)
    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    names = base_names(architecture)
    failed, instead = f"base {model.name} cannot be loaded", "pass another name or folder as base="
    with parsing(failed, instead), quiet_transformers(), apart_from_other_threads():
        if saved.quantization:
            with needed_for("A base in 4 or 8 bits"):
                from transformers.quantizers import AutoQuantizationConfig
            options["quantization_config"] = AutoQuantizationConfig.from_dict(saved.quantization)
        loaded, info = architecture.from_pretrained(
            model.name,
            dtype=saved.dtype if dtype == "auto" else dtype,
            key_mapping=names,
            output_loading_info=True,
            **_check_files(model, token, failed, instead),
            **saved.config.arguments(),
            **options,
        )
    forget_renaming(loaded, names)
    record_origin(loaded, model)
    return loaded, sorted(info["missing_keys"])


def _check_files(model: ModelConfig, token: Token, failed: str, instead: str) -> dict[str, Any]:
    """Check the files of a base, and return the arguments to load it safely; an error line names the base."""
    try:
        return check_checkpoint(model, weights=True, token=token)
    except LightPeftError as error:
        raise LightPeftError(f"{failed}: {error}; {instead}") from error
