"""Light adapters: a plan and PEFT weights in one small folder, loaded over an unchanged base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.adapters.bases import load_base
from lightpeft.adapters.over_base import over_base, stream_of
from lightpeft.adapters.streaming import Stream
from lightpeft.config import ModelConfig
from lightpeft.errors import require
from lightpeft.files import explain_content_errors, read_json, write_json, write_text
from lightpeft.models.repositories import Token
from lightpeft.models.tensors import SharedTensors
from lightpeft.prune.light_model import LightModel, as_light
from lightpeft.saving.adapter_files import (
    DESCRIPTION,
    Saved,
    card_of,
    read_description,
    read_saved,
    vocabulary_in,
)
from lightpeft.saving.cards import CARD
from lightpeft.saving.description import base_facts, facts_of
from lightpeft.saving.on_hub import LIGHT_ADAPTER, folder_of
from lightpeft.saving.tokens import tokenizer_over


def save_metrics(model: LightModel, folder: str | Path) -> None:
    """Update metrics and model card of a saved light adapter; weights are not written again.

    Raises:
        LightPeftError: the folder has no light adapter, or cannot be written.
    """
    file, facts = Path(folder) / DESCRIPTION, facts_of(model)
    write_json(file, {**read_json(file), "metrics": model.light_metrics, "intervals": model.light_intervals})
    write_text(Path(folder) / CARD, card_of(facts, model.light_plan))


def load_light(
    folder: str | Path,
    base: str | Path | PreTrainedModel | None = None,
    *,
    is_trainable: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    low_memory: bool = False,
    revision: str | None = None,
    token: Token = None,
) -> LightModel:
    """Load a light adapter over a fresh base.

    Args:
        folder: folder from `save_pretrained`, or name of the adapter on the hub, which is downloaded unless cached.
        base: name or folder of the base, or the dense model itself, which is then pruned in place;
            None: the base that the adapter names.
        is_trainable: True: adapter weights stay trainable; False: they are frozen, and the model is in eval mode.
        dtype: data type of the base weights, if the base is loaded here; "auto": as in training.
        device: device of the model; None: that of the base.
        attn_implementation: attention backend; None: the default of the base.
        trust_remote_code: run Python code that comes with the base, if it needs any.
        allow_pickle: read the base's weights from pickle files if it has no others; only weights are unpickled.
        low_memory: read the base from disk tensor by tensor, so that memory holds the pruned model and one tensor,
            never the dense model; needs an unquantized base in safetensors files.
        revision: branch, tag or commit of the adapter on the hub; None: the main branch. The base is loaded in the
            revision of the adapter's own record.
        token: hub token for the adapter and its base; None: that of the logged-in account, if any.

    Returns:
        The light model.

    Raises:
        LightPeftError: the hub has no such adapter; a file is missing, altered, or of a newer schema; or the base is
            another one, or one that `low_memory` cannot read. Nothing is loaded in part.

    Example:
        ```python
        light = load_light("adapter")
        tokenizer = light_tokenizer("adapter")
        logits = light(**tokenizer("a warm, funny film", return_tensors="pt")).logits  # [1, classes]
        ```
    """
    saved = read_saved(folder_of(folder, LIGHT_ADAPTER, revision, token))
    stream = None
    if low_memory:
        in_memory = "low_memory reads the base from disk, and base= is a model in memory; leave low_memory out"
        require(not isinstance(base, nn.Module), in_memory)
        stream = stream_of(saved, device)
    if isinstance(base, nn.Module):
        return _make_light(saved, cast(PreTrainedModel, base), is_trainable=is_trainable, device=device)
    place = replace(saved.base.place(cast(Any, base)), trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    dense, lacking = load_base(
        saved.base, place, dtype=dtype, attn_implementation=attn_implementation, stream=stream, token=token
    )
    return _make_light(saved, dense, lacking, stream, is_trainable=is_trainable, device=device)


def load_with_shared_tensors(
    folder: Path,
    place: ModelConfig,
    tensors: SharedTensors,
    *,
    device: str | torch.device | None = None,
    known: Mapping[str, Any] | None = None,
) -> LightModel:
    """Load a light adapter for inference, in low memory, with base tensors that it shares with other models.

    Tensors of the base that neither the plan cuts nor the adapter changes are the same memory in all models that were
    loaded with these `tensors`. They must not be written to.

    Args:
        folder: folder from `save_pretrained`.
        place: name or folder of the base, and how it is loaded.
        tensors: tensors that the models have in common.
        device: device of the model; None: host memory.
        known: description that was loaded from this folder before; if it is unchanged, the adapter is not checked
            against the base again. None: check it.

    Raises:
        LightPeftError: a file is missing, altered, or of a newer schema; or the base is another one, or one that cannot
            be read tensor by tensor.
    """
    saved = read_saved(folder)
    stream = stream_of(saved, device, tensors)
    dense, lacking = load_base(
        saved.base, place, dtype=place.dtype, attn_implementation=place.attn_implementation, stream=stream
    )
    light = _make_light(saved, dense, lacking, stream, device=device, fits=saved.description == known)
    stream.hold(light)
    return light


def _make_light(
    saved: Saved,
    dense: PreTrainedModel,
    lacking: Sequence[str] = (),
    stream: Stream | None = None,
    *,
    device: str | torch.device | None = None,
    **options: bool,
) -> LightModel:
    """Turn a dense model in place into the light model of an adapter.

    Args:
        lacking: names of weights that the dense model's checkpoint lacks.
        stream: stream that the dense model was read through; None: it is in memory.
        device: device of the model; None: that of the base.
        options: `is_trainable` and `fits` of `over_base`.
    """
    model = over_base(saved, dense, lacking, stream, **options)
    with explain_content_errors(saved.folder / DESCRIPTION):
        metrics, task, intervals = (dict(saved.description.get(name, {})) for name in ("metrics", "task", "intervals"))
    return as_light(model if device is None else model.to(device), saved.plan, metrics, task, intervals)


def light_tokenizer(
    folder: str | Path,
    base: str | Path | None = None,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: Token = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a light adapter: that of its base, without tokens that the adapter has cut.

    Args:
        folder: folder from `save_pretrained`, or name of the adapter on the hub.
        base: name or folder of the base; None: the base that the adapter names.
        trust_remote_code: run Python code that comes with the base, if it needs any.
        revision: branch, tag or commit of the adapter on the hub; None: the main branch.
        token: hub token for the adapter and its base; None: that of the logged-in account, if any.

    Returns:
        The tokenizer.

    Raises:
        LightPeftError: a file is missing or altered, or the base is missing or another one.

    Example:
        ```python
        tokenizer = light_tokenizer("adapter")
        batch = tokenizer(["a warm, funny film"], return_tensors="pt")
        ```
    """
    folder = folder_of(folder, LIGHT_ADAPTER, revision, token)
    description, path = read_description(folder), Path(folder)
    place = base_facts(description, path / DESCRIPTION).place(base)
    place = replace(place, trust_remote_code=trust_remote_code)
    return tokenizer_over(place, vocabulary_in(path, description), token)
