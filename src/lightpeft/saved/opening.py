"""What a path or a name stands for (a run, an adapter, a merged or any other whole model), and its live model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lightpeft.config import Head, ModelConfig, RunConfig
from lightpeft.config.validation import from_dict
from lightpeft.errors import LightPeftError, require
from lightpeft.files import understandable
from lightpeft.machine import accelerator
from lightpeft.models.loading import load_model, load_model_config, load_tokenizer
from lightpeft.peft_kinds.placing import peft_task_type
from lightpeft.saved.description import base_facts
from lightpeft.saved.light_adapter import DESCRIPTION, LightModel, load_light, read_description
from lightpeft.saved.merging import MERGED, load_merged, read_merged
from lightpeft.saved.peft_adapter import check_fit, load_adapter, read_adapter, skeleton_of
from lightpeft.saved.run_folder import RunFolder, stored_config
from lightpeft.tasks import ensure_pad_token, restore_task

Form = Literal["light adapter", "merged light model", "PEFT adapter", "model"]


@dataclass(frozen=True)
class Found:
    """A model that is there; nothing of it is loaded yet."""

    name: str
    """As it was asked for."""
    form: Form
    """What its weights are."""
    model: ModelConfig
    """The model itself, or the base of an adapter."""
    config: PretrainedConfig
    """Of that."""
    folder: Path | None = None
    """Where the adapter is."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a light model says of its task; empty for all others."""
    run: RunConfig | None = None
    """The run that it is the result of, if that was asked for."""

    @property
    def kind(self) -> str:
        """What it is, for people."""
        return self.form if self.run is None else f"run ({self.form})"

    @property
    def class_names(self) -> list[str] | None:
        """Names of its classes in order; None where it does not say."""
        if self.facts:
            return list(self.facts["labels"]) or None
        classifies = any("SequenceClassification" in name for name in self.config.architectures or ())
        return list(self.config.id2label.values()) if self.form == "model" and classifies else None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, with a token to pad with."""
        tokenizer = load_tokenizer(self.model)
        ensure_pad_token(tokenizer, self.config)
        return tokenizer


# -- finding -----------------------------------------------------------------------------------------------------


def find_model(name: str | Path, base: str | None = None, settings: Mapping[str, Any] | None = None) -> Found:
    """Find out what a path or a name stands for.

    Args:
        name: folder of a finished run, of a light adapter or merged light model, of a PEFT adapter or of a transformers
            model; or a model's name on the hub.
        base: where an adapter's base is, if not where the adapter says.
        settings: of `ModelConfig`, in place of those that the model was trained with.

    Raises:
        LightPeftError: nothing of that kind is there, or it is incomplete.
    """
    folder = Path(name)
    given = dict(settings or {})
    for marker, find in _FINDERS.items():
        if (folder / marker).is_file():
            return find(folder, base, given)
    kinds = "a run, a light adapter, a merged light model, a PEFT adapter or a transformers model"
    require(not folder.is_dir(), f"{name} is none of {kinds}: it has no {', '.join(_FINDERS)}")
    require(not folder.is_file(), f"{name} is a file; give the folder of {kinds}")
    try:
        return _find_whole(name, base, given)
    except LightPeftError as error:
        raise LightPeftError(f"there is no folder {name} here, and as a model's name: {error}") from error


def _find_run(folder: Path, base: str | None, given: dict[str, Any]) -> Found:
    run = RunFolder(folder, stored_config(folder))
    run.need("train", "evaluate")
    settings = {key: value for key, value in vars(run.config.model).items() if key != "name"} | given
    if run.config.method == "full":
        found = _find_whole(run.model, None, settings | {"revision": None, "gguf_file": None})
    else:
        find = _find_light if run.config.method == "light" else _find_peft
        found = find(run.adapter, base or run.config.model.name, settings)
    return replace(found, name=str(folder), run=run.config)


def _find_light(folder: Path, base: str | None, given: dict[str, Any]) -> Found:
    description = read_description(folder)
    saved = base_facts(description, folder / DESCRIPTION)
    at_home = {"revision": saved.revision} if base is None else {}
    settings = {"gguf_file": saved.gguf_file, "dtype": saved.dtype, **at_home, **given}
    model, config = _base(folder, base or saved.id, settings)
    return Found(str(folder), "light adapter", model, config, folder, _facts(description, folder / DESCRIPTION))


def _find_merged(folder: Path, base: str | None, given: dict[str, Any]) -> Found:
    facts = _facts(read_merged(folder), folder / MERGED)
    return replace(_find_whole(folder, base, given), form="merged light model", folder=folder, facts=facts)


def _facts(description: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a description says of the task; nothing if the model was made in a loop of one's own."""
    with understandable(path):
        facts: dict[str, Any] = description["task"]
        if facts:
            restore_task(facts)
    return facts


def _find_peft(folder: Path, base: str | None, given: dict[str, Any]) -> Found:
    adapter = read_adapter(folder, allow_pickle=bool(given.get("allow_pickle")))
    model, config = _base(folder, base or adapter.base_model_name_or_path, given)
    return Found(str(folder), "PEFT adapter", model, config, folder)


def _find_whole(name: str | Path, base: str | None, given: dict[str, Any]) -> Found:
    require(base is None, f"{name} is a whole model, which has no base; leave --base out")
    model = from_dict(ModelConfig, {**given, "name": str(name)}, "model.")
    return Found(str(name), "model", model, load_model_config(model))


_FINDERS: dict[str, Callable[[Path, str | None, dict[str, Any]], Found]] = {
    DESCRIPTION: _find_light,
    MERGED: _find_merged,
    "adapter_config.json": _find_peft,
    "config.json": _find_whole,
    "config.yaml": _find_run,
}
"""File in a folder -> what the folder is; the first that is there counts."""


def _base(folder: Path, name: str | None, settings: dict[str, Any]) -> tuple[ModelConfig, PretrainedConfig]:
    require(name, f"{folder} does not name its base; give its name or folder: --base")
    model = from_dict(ModelConfig, {**settings, "name": name}, "model.")
    try:
        return model, load_model_config(model)
    except LightPeftError as error:
        raise LightPeftError(f"{folder} needs its base: {error}; give another place of it: --base") from error


# -- loading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """What a model is to be opened for."""

    what: str
    """Name of the task, for error lines."""
    head: Head
    """The head that answers it."""
    labels: Sequence[str] = ()
    """Names of the classes in order; empty without classes."""

    def __str__(self) -> str:
        return self.what if self.what == self.head else f"{self.what} ({self.head})"


def check_answers(found: Found, wanted: Wanted) -> None:
    """Raise `LightPeftError` unless the model can be expected to answer; nothing is loaded for that."""
    if found.facts:
        trained = restore_task(found.facts)
        _require_head(found, trained.head == wanted.head, str(Wanted(trained.config.task, trained.head)), wanted)
    if found.form == "PEFT adapter":
        kind = _adapter(found).task_type
        _require_head(found, kind in (None, peft_task_type(wanted.head)), f"PEFT's task type {kind}", wanted)


def _require_head(found: Found, fits: bool, trained: str, wanted: Wanted) -> None:
    refusal = f"{found.name} was trained for {trained} and cannot answer {wanted}"
    require(fits, f"{refusal}; give a model of this task, or another task")


def open_model(found: Found, wanted: Wanted) -> nn.Module:
    """The live model in evaluation mode, with the head that is wanted, on the device at hand.

    Raises:
        LightPeftError: it cannot be loaded, or its weights don't fit.
    """
    check_answers(found, wanted)
    model = _LOADERS[found.form](found, wanted).eval()
    device = accelerator()
    if device is not None and not getattr(model, "is_quantized", False):  # those are put there on loading
        model.to(device)
    return model


def open_light(found: Found) -> LightModel:
    """The live model of a light adapter, with its own head, in host memory.

    Raises:
        LightPeftError: it is none, or cannot be loaded.
    """
    require(found.form == "light adapter", f"{found.name} is a {found.kind}; give a light adapter or the run of one")
    return load_light(
        _folder(found),
        found.model.name,
        dtype=found.model.dtype,
        attention=found.model.attention,
        trust_remote_code=found.model.trust_remote_code,
        allow_pickle=found.model.allow_pickle,
    )


def _load_light(found: Found, wanted: Wanted) -> nn.Module:
    return open_light(found)


def _load_merged(found: Found, wanted: Wanted) -> nn.Module:
    return load_merged(_folder(found), dtype=found.model.dtype, attention=found.model.attention)


def _load_peft(found: Found, wanted: Wanted) -> nn.Module:
    folder, config = _folder(found), _adapter(found)
    loaded = load_model(found.model, wanted.head, wanted.labels, to_prune=False)
    brought = set(config.modules_to_save or ())
    _require_trained(found, [name for name in loaded.new_modules if name not in brought], wanted)
    try:
        check_fit(skeleton_of(loaded.model), config, folder, exact=False)
        return load_adapter(loaded.model, folder, config)
    except LightPeftError as error:
        raise _not_fitting(found, wanted, error) from error


def _load_whole(found: Found, wanted: Wanted) -> nn.Module:
    try:
        loaded = load_model(found.model, wanted.head, wanted.labels, to_prune=False)
    except LightPeftError as error:
        if "ignore_mismatched_sizes" not in str(error.__cause__):
            raise
        shapes = "weights have other shapes: other labels, or merged by other means than lightpeft export"
        raise _not_fitting(found, wanted, shapes) from error
    _require_trained(found, loaded.new_modules, wanted)
    return loaded.model


_LOADERS: dict[Form, Callable[[Found, Wanted], nn.Module]] = {
    "light adapter": _load_light,
    "merged light model": _load_merged,
    "PEFT adapter": _load_peft,
    "model": _load_whole,
}


def _folder(found: Found) -> Path:
    assert found.folder is not None
    return found.folder


def _adapter(found: Found) -> PeftConfig:
    return read_adapter(_folder(found), allow_pickle=found.model.allow_pickle)


def _require_trained(found: Found, untrained: Sequence[str], wanted: Wanted) -> None:
    require(
        not untrained,
        f"{found.name} has no weights for {', '.join(untrained)}, so its answers to {wanted} "
        "would be random; train it first: lightpeft run",
    )


def _not_fitting(found: Found, wanted: Wanted, why: Exception | str) -> LightPeftError:
    classes = f" with {len(wanted.labels)} labels" if wanted.labels else ""
    reason = " ".join(str(why).split())[-200:]
    return LightPeftError(f"{found.name} does not fit {wanted.what}{classes}: {reason}")
