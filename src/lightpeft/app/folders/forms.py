"""The forms of a saved model: how to find each, check that it can answer a task, and load it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightpeft.adapters.auto_classes import LightModelConfig
from lightpeft.adapters.light_adapter import load_light
from lightpeft.adapters.merging import load_merged, merged_config
from lightpeft.app.folders.results import Model
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.loading import restore_task
from lightpeft.app.tasks.tokens import padding_within
from lightpeft.config import ModelConfig, RunConfig
from lightpeft.config.validation import from_dict
from lightpeft.errors import LightPeftError, one_line, require
from lightpeft.files import explain_content_errors
from lightpeft.machine import accelerator, autocast_dtype
from lightpeft.models.families.family_table import max_positions
from lightpeft.models.loading import load_model, load_model_config
from lightpeft.models.task_heads import TaskHead
from lightpeft.models.tokenizers import ensure_pad_token, load_tokenizer
from lightpeft.models.vocabulary.cutting import cut_config
from lightpeft.models.vocabulary.kept import Vocabulary
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.prune.light_model import LightModel
from lightpeft.saving.adapter_files import DESCRIPTION, read_description, vocabulary_in
from lightpeft.saving.description import base_facts
from lightpeft.saving.on_hub import LIGHT_ADAPTER, MERGED_MODEL
from lightpeft.saving.peft_adapter import (
    check_adapter_fit,
    load_adapter,
    read_adapter,
    skeleton_of,
)
from lightpeft.saving.tokens import tokenizer_over
from lightpeft.saving.whole import MERGED, read_merged

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Wanted:
    """The task for which a model is opened."""

    what: str
    """Name of the task, for error messages."""
    head: TaskHead
    """Head that answers it."""
    labels: Sequence[str] = ()
    """Names of the classes in order; empty without classes."""

    @classmethod
    def of(cls, task: Task) -> Wanted:
        """Return the head and labels that `task` needs."""
        return cls(task.config.task, task.head, task.labels)

    def __str__(self) -> str:
        return self.what if self.what == self.head.name else f"{self.what} ({self.head})"


@dataclass(frozen=True, kw_only=True)
class Found(ABC):
    """A saved model in one of the forms below, before any weights are loaded."""

    form: ClassVar[str]
    """Name of the form, as text for users."""
    name: str
    """Path or name that the user gave."""
    model: ModelConfig
    """How to load the model itself, or the base of an adapter."""
    description: Mapping[str, Any] = field(default_factory=dict)
    """Description that a light model was saved with; empty for all others."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Facts of its task (`tasks.task_facts`); empty if unknown."""
    run: RunConfig | None = None
    """Config of the run that it is the result of, if the user gave a run."""

    @classmethod
    @abstractmethod
    def find(cls, place: Path, base: str | None, settings: Mapping[str, Any]) -> Self:
        """Return the model in a folder of this form, not loaded.

        Args:
            place: the folder.
            base: name or folder of an adapter's base; None: as the adapter says.
            settings: fields of `ModelConfig` that override those of training.

        Raises:
            LightPeftError: the folder is incomplete.
        """

    @abstractmethod
    def load(self, wanted: Wanted, base: PreTrainedModel | None = None) -> Model:
        """Load the model; `base` is an adapter's live base, or None to load it. `open` adds the checks."""

    @property
    def kind(self) -> str:
        """Form of the model, or "run" with the form, as text for users."""
        return self.form if self.run is None else f"run ({self.form})"

    @cached_property
    def config(self) -> PretrainedConfig:
        """Configuration of the model itself, or of the base of an adapter.

        Raises:
            LightPeftError: the model does not exist.
        """
        return load_model_config(self.model)

    @property
    def class_names(self) -> list[str] | None:
        """Names of its classes in order; None if unknown."""
        return list(self.facts.get("labels", ())) or None

    @property
    def precision(self) -> torch.dtype | None:
        """Autocast dtype of its run on this machine; None: the dtype of the weights."""
        return None if self.run is None else autocast_dtype(self.run.training)

    def padding(self, max_length: int) -> int | None:
        """Return the multiple to which its run pads batches; None: pad to the longest row."""
        if self.run is None:
            return None
        return padding_within(max_length, max_positions(self.config))

    def checked(self) -> Self:
        """Return self, after a check that the model, or the base of the adapter, exists."""
        assert self.config is not None
        return self

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return its tokenizer, with a padding token."""
        tokenizer = load_tokenizer(self.model, self.config)
        ensure_pad_token(tokenizer, self.config)
        return tokenizer

    def check(self, wanted: Wanted) -> None:
        """Raise `LightPeftError` if its task is known and has another head; no weights are loaded."""
        if self.facts:
            trained = restore_task(self.facts)
            self._require_head(trained.head == wanted.head, str(Wanted.of(trained)), wanted)

    def _require_head(self, fits: bool, trained: str, wanted: Wanted) -> None:
        """Raise `LightPeftError` unless `fits`: the model was trained for another kind of task."""
        refusal = f"{self.name} was trained for {trained} and cannot answer {wanted}"
        require(fits, f"{refusal}; give a model for this task, or another task")

    def _require_trained(self, untrained: Sequence[str], wanted: Wanted) -> None:
        """Raise `LightPeftError` if modules are untrained, so that answers would come from random weights."""
        require(
            not untrained,
            f"{self.name} has no weights for {', '.join(untrained)}, so its answers to {wanted} "
            "would be random; train it first: lightpeft run",
        )

    def _misfit(self, wanted: Wanted, why: Exception | str) -> LightPeftError:
        """Return the error about weights that do not fit the task."""
        classes = f" with {len(wanted.labels)} labels" if wanted.labels else ""
        reason = one_line(why)[-200:]
        return LightPeftError(f"{self.name} does not fit {wanted.what}{classes}: {reason}")

    def open(self, wanted: Wanted, base: PreTrainedModel | None = None) -> Model:
        """Return the live model in evaluation mode, with the wanted head, on the accelerator if there is one.

        Args:
            wanted: the task to answer.
            base: live base of an adapter, which is changed in place; None: load it. A whole model has no base.

        Raises:
            LightPeftError: the model cannot answer the task, cannot be loaded, or its weights do not fit.
        """
        self.check(wanted)
        return to_device(self.load(wanted, base).eval())


@dataclass(frozen=True, kw_only=True)
class WholeModel(Found):
    """A transformers model, in a folder or on the hub."""

    form = "model"

    @classmethod
    def find(cls, place: str | Path, base: str | None, settings: Mapping[str, Any]) -> Self:
        """Return the model, not loaded; `place` may also be a name on the hub."""
        return cls(name=str(place), model=_whole_settings(place, base, settings))

    @cached_property
    def config(self) -> PretrainedConfig:
        """Configuration of the model, read by transformers.

        Raises:
            LightPeftError: the model does not exist, or is a merged light model without its plan.
        """
        config = load_model_config(self.model)
        alone = f"{self.name} has the weights of a pruned model without its plan: {MERGED} is missing; add it"
        require(not isinstance(config, LightModelConfig), alone)
        return config

    @property
    def class_names(self) -> list[str] | None:
        """Class names in its config, if it is a sequence classifier; else None."""
        classifies = any("SequenceClassification" in name for name in self.config.architectures or ())
        return [str(name) for name in self.config.id2label.values()] if classifies else None

    def load(self, wanted: Wanted, base: PreTrainedModel | None = None) -> PreTrainedModel:
        """Load the model with transformers; an untrained head is an error."""
        try:
            loaded = load_model(self.model, wanted.head, wanted.labels, to_prune=False)
        except LightPeftError as error:
            if "ignore_mismatched_sizes" not in str(error.__cause__):
                raise
            shapes = "weights have other shapes: another number of labels, or not merged by lightpeft export"
            raise self._misfit(wanted, shapes) from error
        self._require_trained(loaded.new_modules, wanted)
        return loaded.model


@dataclass(frozen=True, kw_only=True)
class MergedModel(Found):
    """A light model with merged PEFT weights, written by `save_merged`."""

    form = MERGED_MODEL.what

    @cached_property
    def config(self) -> PretrainedConfig:
        """Configuration of the model, also if transformers cannot load its pruned shapes."""
        folder = Path(self.model.name)
        return merged_config(folder, base_facts(self.description, folder / MERGED))

    @classmethod
    def find(cls, place: Path, base: str | None, settings: Mapping[str, Any]) -> Self:
        """Return the merged model in `place`, by the description beside its weights."""
        description = read_merged(place)
        facts = read_task_facts(description, place / MERGED)
        model = _whole_settings(place, base, settings)
        return cls(name=str(place), model=model, description=description, facts=facts)

    def load(self, wanted: Wanted, base: PreTrainedModel | None = None) -> PreTrainedModel:
        """Load the weights directly into the pruned layers."""
        return load_merged(self.model.name, dtype=self.model.dtype, attn_implementation=self.model.attn_implementation)


@dataclass(frozen=True, kw_only=True)
class _Adapter(Found):
    """Adapter weights in a folder, over a base model elsewhere."""

    folder: Path
    """Folder of the adapter."""

    @cached_property
    def config(self) -> PretrainedConfig:
        """Configuration of the base."""
        return self._base_config()

    def _base_config(self) -> PretrainedConfig:
        try:
            return load_model_config(self.model)
        except LightPeftError as error:
            raise LightPeftError(
                f"{self.name} needs its base model: {error}; give its name or folder: --base"
            ) from error


@dataclass(frozen=True, kw_only=True)
class LightAdapter(_Adapter):
    """A light adapter: a plan and PEFT weights, written by `LightModel.save_pretrained`."""

    form = LIGHT_ADAPTER.what

    @classmethod
    def find(cls, place: Path, base: str | None, settings: Mapping[str, Any]) -> Self:
        """Return the light adapter in `place`, by its description, which also says how to load the base."""
        description = read_description(place)
        saved = base_facts(description, place / DESCRIPTION)
        at_home = {"revision": saved.revision} if base is None else {}
        as_saved = {"gguf_file": saved.gguf_file, "dtype": saved.dtype, **at_home}
        model = _base_settings(place, base or saved.id, {**as_saved, **settings})
        facts = read_task_facts(description, place / DESCRIPTION)
        return cls(name=str(place), model=model, description=description, facts=facts, folder=place)

    @cached_property
    def config(self) -> PretrainedConfig:
        """Configuration of the base, with the adapter's vocabulary."""
        return self._base_config() if self.vocabulary is None else cut_config(self._base_config(), self.vocabulary)

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """Tokens of the base that it keeps; None: all."""
        return vocabulary_in(self.folder, self.description)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the base's tokenizer, cut to the adapter's vocabulary if it has its own."""
        return super().tokenizer() if self.vocabulary is None else tokenizer_over(self.model, self.vocabulary)

    @property
    def plan(self) -> PrunePlan:
        """Plan with the units of the base that it keeps."""
        with explain_content_errors(self.folder / DESCRIPTION):
            return PrunePlan.from_dict(self.description["plan"])

    def load(self, wanted: Wanted | None = None, base: PreTrainedModel | None = None) -> LightModel:
        """Load it with the head of its training, not `wanted`'s; in host memory, or on the device of `base`."""
        return load_light(
            self.folder,
            self.model.name if base is None else base,
            dtype=self.model.dtype,
            attn_implementation=self.model.attn_implementation,
            trust_remote_code=self.model.trust_remote_code,
            allow_pickle=self.model.allow_pickle,
            low_memory=self.model.low_memory and base is None,
        )


@dataclass(frozen=True, kw_only=True)
class PeftAdapter(_Adapter):
    """An adapter in PEFT's format, from any program."""

    form = "PEFT adapter"

    @classmethod
    def find(cls, place: Path, base: str | None, settings: Mapping[str, Any]) -> Self:
        """Return the PEFT adapter in `place`, by its adapter_config.json."""
        adapter = read_adapter(place, allow_pickle=bool(settings.get("allow_pickle")))
        model = _base_settings(place, base or adapter.base_model_name_or_path, settings)
        return cls(name=str(place), model=model, folder=place)

    def check(self, wanted: Wanted) -> None:
        """Raise `LightPeftError` if its task, or PEFT's task type, has another head; no weights are loaded."""
        super().check(wanted)
        kind = self._settings().task_type
        self._require_head(kind in (None, wanted.head.task_type), f"PEFT's task type {kind}", wanted)

    def load(self, wanted: Wanted, base: PreTrainedModel | None = None) -> PeftModel:
        """Load it over the base with the wanted head; adapter or base must have trained weights for the head."""
        settings = self._settings()
        if base is None:
            loaded = load_model(self.model, wanted.head, wanted.labels, to_prune=False)
            brought = set(settings.modules_to_save or ())
            self._require_trained([name for name in loaded.new_modules if name not in brought], wanted)
            base = loaded.model
        try:
            check_adapter_fit(skeleton_of(base), settings, self.folder, exact=False)
            return load_adapter(base, self.folder, settings)
        except LightPeftError as error:
            raise self._misfit(wanted, error) from error

    def _settings(self) -> PeftConfig:
        """Read its PEFT config; not cached, since PEFT changes the object."""
        return read_adapter(self.folder, allow_pickle=self.model.allow_pickle)


# -- shared by the forms ---------------------------------------------------------------------------------------------


def _whole_settings(place: str | Path, base: str | None, settings: Mapping[str, Any]) -> ModelConfig:
    """Return the `ModelConfig` to load a whole model."""
    require(base is None, f"{place} is a whole model and has no base; leave out --base")
    return from_dict(ModelConfig, {**settings, "name": str(place)}, "model.")


def _base_settings(folder: Path, name: str | None, settings: Mapping[str, Any]) -> ModelConfig:
    """Return the `ModelConfig` to load the base of an adapter."""
    require(name, f"{folder} does not name its base model; give its name or folder: --base")
    return from_dict(ModelConfig, {**settings, "name": name}, "model.")


def read_task_facts(description: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the task's facts in a description; empty if a training loop without a task made the model.

    Args:
        path: file of the description, for error messages.

    Raises:
        LightPeftError: the facts are invalid.
    """
    with explain_content_errors(path):
        facts: dict[str, Any] = description["task"] or {}
        if facts:
            restore_task(facts)
    return facts


def to_device(model: M) -> M:
    """Move a model to the accelerator, if there is one; a quantized model was loaded there."""
    device = accelerator()
    if device is not None and not getattr(model, "is_quantized", False):
        model.to(device)
    return model
