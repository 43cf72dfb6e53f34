"""The base that a light model says it was made from, loaded: nothing else that it says counts."""

from __future__ import annotations

from typing import Any, cast

import torch
import transformers
from transformers import PreTrainedModel

from lightpeft.adapters.streaming import Stream
from lightpeft.compat.missing import needed_for
from lightpeft.compat.transformers import apart_from_other_threads
from lightpeft.config import ModelConfig
from lightpeft.errors import LightPeftError, require
from lightpeft.files.foreign import parsing
from lightpeft.models.loading import base_names, check_checkpoint, keep_own_names, quiet_transformers, record_origin
from lightpeft.saving.description import BaseFacts


def architecture_of(saved: BaseFacts, instead: str) -> type[PreTrainedModel]:
    """The class of transformers that a saved model's base is of.

    Raises:
        LightPeftError: there is none in this version; the line ends with what to do instead.
    """
    with parsing(f"transformers cannot give {saved.architecture}", instead):
        found = getattr(transformers, saved.architecture, None)
    fits = isinstance(found, type) and issubclass(found, PreTrainedModel) and found is not PreTrainedModel
    require(fits, f"transformers has no {saved.architecture} that is a model; {instead}")
    return cast(type[PreTrainedModel], found)


def load_base(
    saved: BaseFacts,
    model: ModelConfig,
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    stream: Stream | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """Load the base of a light adapter, dense or into a stream, with the head that the adapter was trained with.

    Args:
        model: where it is, and whether code or pickled weights of it may be read; the rest is as it was saved.
        dtype: of the weights; "auto": as it was.
        attn_implementation: attention backend; None: the one it would use.
        stream: to read it into.

    Returns:
        It, and the names of weights that its checkpoint does not have.

    Raises:
        LightPeftError: it is not there, damaged, or needs what the settings do not allow.
    """
    architecture = architecture_of(saved, "load the base yourself and pass it as base=")
    if stream is not None:
        architecture = stream.loader(architecture)
    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    names = base_names(architecture)
    failed, instead = f"base {model.name} cannot be loaded", "give another place: base=..."
    with parsing(failed, instead), quiet_transformers(), apart_from_other_threads():
        if saved.quantisation:
            with needed_for("A base in 4 or 8 bits"):
                from transformers.quantizers import AutoQuantizationConfig
            options["quantization_config"] = AutoQuantizationConfig.from_dict(saved.quantisation)
        loaded, info = architecture.from_pretrained(
            model.name,
            dtype=saved.dtype if dtype == "auto" else dtype,
            key_mapping=names,
            output_loading_info=True,
            **_checked(model, failed, instead),
            **saved.config.arguments(),
            **options,
        )
    keep_own_names(loaded, names)
    record_origin(loaded, model)
    return loaded, sorted(info["missing_keys"])


def _checked(model: ModelConfig, failed: str, instead: str) -> dict[str, Any]:
    try:
        return check_checkpoint(model, weights=True)
    except LightPeftError as error:
        raise LightPeftError(f"{failed}: {error}; {instead}") from error
