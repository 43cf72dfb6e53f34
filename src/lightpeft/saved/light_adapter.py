"""Light adapters: a plan and PEFT weights in one small folder, over a base that is never written to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.config import ModelConfig
from lightpeft.errors import require
from lightpeft.files import read_json, replacing_folder, understandable, write_json, write_text
from lightpeft.models import repositories
from lightpeft.models.tensors import SharedTensors
from lightpeft.models.unwrap import transformers_model
from lightpeft.models.vocabulary import vocabulary_of
from lightpeft.peft_kinds.sites import own_adapter
from lightpeft.plans.records import PrunePlan
from lightpeft.saved.adapter_files import (
    DESCRIPTION,
    FILES,
    ON_HUB,
    Saved,
    card_of,
    read_description,
    read_saved,
    vocabulary_in,
    write_beside,
)
from lightpeft.saved.bases import load_base
from lightpeft.saved.cards import CARD
from lightpeft.saved.description import base_facts, facts_of, unmeasured
from lightpeft.saved.merging import settle
from lightpeft.saved.over_base import over_base, stream_of
from lightpeft.saved.streaming import Stream
from lightpeft.saved.tokens import tokenizer_over
from lightpeft.saved.uploading import send


class LightModel(PeftModel):
    """A pruned `PeftModel`. It trains, generates and merges as one; `save_pretrained` writes a light adapter."""

    light_plan: PrunePlan
    """Which units of the dense base are here."""
    light_metrics: dict[str, Any]
    """What was measured of this model; saved with it."""
    light_intervals: dict[str, Any]
    """95% intervals of some of that: name -> (low, high) or None."""
    light_task: dict[str, Any]
    """How inputs are read (task kind, columns, length); saved with it, empty if unknown."""

    def save_pretrained(self, save_directory: str | Path, *, is_main_process: bool = True, **kwargs: Any) -> None:
        """Write a light adapter: PEFT's own two files, `lightpeft.json` and a model card.

        Of a model with fewer tokens, also which these are; no embeddings. Where anything of the base is cut, PEFT's own
        loader refuses the folder (`sites.hide_config`). The reference of one of TRL's trainers, beside the adapter, is
        not written.

        Raises:
            LightPeftError: there are other adapters, or the folder cannot be written (for example: disk full); no file
                is half-written.
        """
        require(kwargs.get("safe_serialization", True), "a light adapter is written as safetensors, never as pickle")
        name = own_adapter(self)
        selected = kwargs.pop("selected_adapters", None) or [name]
        several = f"a light adapter has one adapter, {name}; it cannot be saved with {', '.join(selected)}"
        require(list(selected) == [name], several)
        if not is_main_process:
            return
        vocabulary = vocabulary_of(transformers_model(self))
        if vocabulary is not None:
            kwargs["save_embedding_layers"] = False  # PEFT takes them for trained, as there are fewer than in the base
        with replacing_folder(save_directory, last=DESCRIPTION, obsolete=FILES) as temporary:
            super().save_pretrained(str(temporary), selected_adapters=[name], **kwargs)
            _move_up(temporary / name)
            write_beside(temporary, facts_of(self), self.light_plan, vocabulary)

    @classmethod
    def from_pretrained(
        cls, model: str | Path | PreTrainedModel, model_id: str | Path | None = None, **options: Any
    ) -> LightModel:
        """`load_light`, called as transformers does it (folder) or as PEFT does it (base, folder).

        Args:
            model: folder or hub name of the light adapter; or the dense base, which is pruned in place.
            model_id: of the adapter, where the base comes first.
            options: of `load_light`.
        """
        return load_light(model, **options) if model_id is None else load_light(model_id, model, **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: repositories.Token = None,
        commit_message: str | None = None,
        **options: Any,
    ) -> str:
        """Send the light adapter, as `save_pretrained` writes it, to the hub.

        Args:
            repo_id: owner/name of a repository, which is made if it is not there.
            private: whether one that is made is to be read by its owner alone; None: as the owner's usual.
            revision: branch, which is made if it is not there; None: the main branch.
            token: of an account that may write there; None: the one that is logged in.
            commit_message: says what is new.
            options: of `save_pretrained`.

        Returns:
            Where the commit is.

        Raises:
            LightPeftError: it cannot be sent.
        """

        def write(folder: Path) -> None:
            self.save_pretrained(folder, **options)

        return send(write, repo_id, private=private, revision=revision, token=token, commit_message=commit_message)

    def load_adapter(self, model_id: str | Path, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """PEFT's `load_adapter`, of weights for the units that are here, as in a trainer's checkpoint of this model.

        Raises:
            LightPeftError: they are a light adapter's with another plan.
        """
        folder = Path(model_id)
        if (folder / DESCRIPTION).is_file():
            with understandable(folder / DESCRIPTION):
                plan = PrunePlan.from_dict(read_description(folder)["plan"])
            other = f"{folder} is for other units of the base than are here; load_light(folder) gives its own"
            require(plan == self.light_plan, other)
        return super().load_adapter(str(model_id), adapter_name, *args, **kwargs)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """PEFT's `merge_and_unload`: a plain transformers model, pruned, that saves itself so that it can be loaded.

        If its layers are all equally wide and its config can say so, by transformers; else by `load_merged`.
        """
        return self._settled(self.base_model.merge_and_unload(*args, **kwargs))

    def unload(self) -> PreTrainedModel:
        """PEFT's `unload`: the same without the adapter, the pruned base alone."""
        return self._settled(self.base_model.unload())

    def _settled(self, whole: PreTrainedModel) -> PreTrainedModel:
        settle(whole, self.light_plan, unmeasured(facts_of(self)))
        return whole


def _move_up(folder: Path) -> None:
    """Move the files of an adapter that is not called "default" to where PEFT writes those of one that is."""
    if folder.is_dir():
        for file in folder.iterdir():
            file.replace(folder.parent / file.name)
        folder.rmdir()


def save_metrics(model: LightModel, folder: str | Path) -> None:
    """Write what was measured of a light model into where it is saved; no weight is written again.

    Raises:
        LightPeftError: there is no light adapter, or it cannot be written.
    """
    file, facts = Path(folder) / DESCRIPTION, facts_of(model)
    write_json(file, {**read_json(file), "metrics": model.light_metrics, "intervals": model.light_intervals})
    write_text(Path(folder) / CARD, card_of(facts, model.light_plan))


def as_light(
    model: PeftModel,
    plan: PrunePlan,
    metrics: dict[str, Any] | None = None,
    task: dict[str, Any] | None = None,
    intervals: dict[str, Any] | None = None,
) -> LightModel:
    """Make a pruned `PeftModel` one that saves itself as a light adapter; same object, same weights."""
    kind = type(model)
    if not issubclass(kind, LightModel):
        # the model keeps its own class (for sequence classification, causal LM, ...) with `save_pretrained` before it,
        # and that one's name, by which transformers' pipelines know what they can take
        model.__class__ = type(kind.__name__, (LightModel, kind), {"__doc__": kind.__doc__})
    vars(model).pop("save_pretrained", None)  # that of a dense model with fewer tokens
    light = cast(LightModel, model)
    light.light_plan = plan
    light.light_metrics = dict(metrics or {})
    light.light_intervals = dict(intervals or {})
    light.light_task = dict(task or {})
    return light


def load_light(
    folder: str | Path,
    base: str | Path | PreTrainedModel | None = None,
    *,
    is_trainable: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attention: str | None = None,
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
        attention: attention backend; None: the one the base would use.
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
    dense, lacking = load_base(saved.base, place, dtype=dtype, attention=attention, stream=stream)
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
    dense, lacking = load_base(saved.base, place, dtype=place.dtype, attention=place.attention, stream=stream)
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
