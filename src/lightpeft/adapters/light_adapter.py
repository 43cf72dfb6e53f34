"""Light adapters: a plan and PEFT weights in one small folder, over a base that is never written to."""

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
from lightpeft.files import read_json, write_json, write_text
from lightpeft.models import repositories
from lightpeft.models.tensors import SharedTensors
from lightpeft.prune.light_model import LightModel, as_light
from lightpeft.saving.adapter_files import (
    DESCRIPTION,
    ON_HUB,
    Saved,
    card_of,
    read_description,
    read_saved,
    vocabulary_in,
)
from lightpeft.saving.cards import CARD
from lightpeft.saving.description import base_facts, facts_of
from lightpeft.saving.tokens import tokenizer_over


def save_metrics(model: LightModel, folder: str | Path) -> None:
    """Write what was measured of a light model into where it is saved; no weight is written again.

    Raises:
        LightPeftError: there is no light adapter, or it cannot be written.
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
    token: repositories.Token = None,
) -> LightModel:
    """Load a light adapter over a fresh base.

    Args:
        folder: what `save_pretrained` wrote; or its name on the hub, from where it is downloaded if it is not in the
            cache.
        base: name or folder of the base, or the dense model itself, which is then pruned in place;
            None: the base that the adapter names.
        is_trainable: go on training; else the weights are frozen and the model is in eval mode.
        dtype: of the base weights when they are loaded here; "auto": as it was when the adapter was saved.
        device: where to put the model; None: where the base is.
        attn_implementation: attention backend; None: the one the base would use.
        trust_remote_code: run Python code that comes with the base, if it needs any.
        allow_pickle: read the base's weights from pickle files if it has no others; weights alone are unpickled.
        low_memory: read the base from disk one tensor at a time and keep only what the plan keeps, so that memory holds
            the pruned model and one tensor, never the dense model; for unquantised bases in safetensors files.
        revision: branch, tag or commit of the adapter on the hub; None: the main branch. The base has that of the
            adapter's own record.
        token: for the adapter on the hub; None: that of the account that is logged in, if any.

    Raises:
        LightPeftError: the hub has no such adapter; a file is missing, altered, or of a newer schema; or the base is
            another one, or not of the kind that `low_memory` can read. No partial load.
    """
    saved = read_saved(repositories.folder_of(folder, ON_HUB, revision, token))
    stream = None
    if low_memory:
        in_memory = "low_memory reads the base from disk, and base= is a model in memory: load without low_memory"
        require(not isinstance(base, nn.Module), in_memory)
        stream = stream_of(saved, device)
    if isinstance(base, nn.Module):
        return _light(saved, cast(PreTrainedModel, base), is_trainable=is_trainable, device=device)
    place = replace(saved.base.place(cast(Any, base)), trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    dense, lacking = load_base(saved.base, place, dtype=dtype, attn_implementation=attn_implementation, stream=stream)
    return _light(saved, dense, lacking, stream, is_trainable=is_trainable, device=device)


def load_sharing(
    folder: Path,
    place: ModelConfig,
    tensors: SharedTensors,
    *,
    device: str | torch.device | None = None,
    known: Mapping[str, Any] | None = None,
) -> LightModel:
    """Load a light adapter as `load_light` does in low memory, over tensors that it shares with others, to be asked.

    What the plan leaves whole of the base, and the adapter does not change, is the same memory in all
    models that were loaded with these `tensors`. Nobody may write to it.

    Args:
        folder: what `save_pretrained` wrote.
        place: where the base is and how it is loaded.
        tensors: what the model shares, with those that were loaded with it before.
        device: where to put the model; None: host memory.
        known: the description of what was loaded from the folder before; if it is there still, it fits the base still.

    Raises:
        LightPeftError: as `load_light`.
    """
    saved = read_saved(folder)
    stream = stream_of(saved, device, tensors)
    dense, lacking = load_base(
        saved.base, place, dtype=place.dtype, attn_implementation=place.attn_implementation, stream=stream
    )
    light = _light(saved, dense, lacking, stream, device=device, fits=saved.description == known)
    stream.hold(light)
    return light


def _light(
    saved: Saved,
    dense: PreTrainedModel,
    lacking: Sequence[str] = (),
    stream: Stream | None = None,
    *,
    device: str | torch.device | None = None,
    **options: bool,
) -> LightModel:
    """The light model that a dense one becomes, in place; arguments as for `over_base`."""
    model = over_base(saved, dense, lacking, stream, **options)
    metrics, task, intervals = (dict(saved.description.get(name, {})) for name in ("metrics", "task", "intervals"))
    return as_light(model if device is None else model.to(device), saved.plan, metrics, task, intervals)


def light_tokenizer(
    folder: str | Path,
    base: str | Path | None = None,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: repositories.Token = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer that a light adapter is asked with: its base's, or of that the tokens that the adapter keeps.

    Args:
        folder: what `save_pretrained` wrote, or its name on the hub.
        base: name or folder of the base; None: the base that the adapter names.
        trust_remote_code: run Python code that comes with the base, if it needs any.
        revision: as for `load_light`.
        token: as for `load_light`.

    Raises:
        LightPeftError: a file is missing or altered, or the base is not there or another one.
    """
    folder = repositories.folder_of(folder, ON_HUB, revision, token)
    description, path = read_description(folder), Path(folder)
    place = base_facts(description, path / DESCRIPTION).place(base)
    return tokenizer_over(replace(place, trust_remote_code=trust_remote_code), vocabulary_in(path, description))
