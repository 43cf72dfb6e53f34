"""The forms that a saved model has: how each is found, whether it can answer, and how it is loaded."""

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
from lightpeft.models.families.registry import max_positions
from lightpeft.models.loading import load_model, load_model_config, load_tokenizer
from lightpeft.models.task_heads import TaskHead
from lightpeft.models.tokenizers import ensure_pad_token
from lightpeft.models.vocabulary.cutting import cut_config
from lightpeft.models.vocabulary.kept import Vocabulary
from lightpeft.plans.records import PrunePlan
from lightpeft.prune.light_model import LightModel
from lightpeft.saving import adapter_files, whole
from lightpeft.saving.adapter_files import DESCRIPTION, read_description, vocabulary_in
from lightpeft.saving.description import base_facts
from lightpeft.saving.peft_adapter import (
    check_fit,
    load_adapter,
    read_adapter,
    skeleton_of,
)
from lightpeft.saving.tokens import tokenizer_over
from lightpeft.saving.whole import MERGED, read_merged

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Wanted:
    """What a model is to be opened for."""

    what: str
    """Name of the task, for error lines."""
    head: TaskHead
    """The head that answers it."""
    labels: Sequence[str] = ()
    """Names of the classes in order; empty without classes."""

    @classmethod
    def of(cls, task: Task) -> Wanted:
        """To answer a task."""
        return cls(task.config.task, task.head, task.labels)

    def __str__(self) -> str:
        return self.what if self.what == self.head.name else f"{self.what} ({self.head})"


@dataclass(frozen=True, kw_only=True)
class Found(ABC):
    """A model that is there, in one of the forms below; nothing of it is loaded yet."""

    form: ClassVar[str]
    """What its weights are, for people."""
    name: str
    """As it was asked for."""
    model: ModelConfig
    """The model itself, or the base of an adapter."""
    description: Mapping[str, Any] = field(default_factory=dict)
    """What a light model says of itself; empty for all others."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What is said of its task (`tasks.task_facts`); empty where nobody says anything."""
    run: RunConfig | None = None
    """The run that it is the result of, if that was asked for."""

    @classmethod
    @abstractmethod
    def find(cls, place: Path, base: str | None, settings: Mapping[str, Any]) -> Self:
        """What is in a folder of this form; arguments and errors as for `find_model`."""

    @abstractmethod
    def load(self, wanted: Wanted, base: PreTrainedModel | None = None) -> Model:
        """The live model; arguments and errors as for `open`."""

    @property
    def kind(self) -> str:
        """What it is, for people."""
        return self.form if self.run is None else f"run ({self.form})"

    @cached_property
    def config(self) -> PretrainedConfig:
        """Of the model itself, or of the base of an adapter.

        Raises:
            LightPeftError: it is not there.
        """
        return load_model_config(self.model)

    @property
    def class_names(self) -> list[str] | None:
        """Names of its classes in order; None where it does not say."""
        return list(self.facts.get("labels", ())) or None

    @property
    def precision(self) -> torch.dtype | None:
        """The half precision that its run computes in here under autocast; None: that of the weights."""
        return None if self.run is None else autocast_dtype(self.run.training)

    def padding(self, max_length: int) -> int | None:
        """What its run pads batches of rows of so many tokens to a multiple of; None: nothing but the longest row."""
        if self.run is None:
            return None
        return padding_within(max_length, max_positions(self.config))

    def checked(self) -> Self:
        """Itself, if the model, or the base of the adapter, is there."""
        assert self.config is not None
        return self

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, with a token to pad with."""
        tokenizer = load_tokenizer(self.model, self.config)
        ensure_pad_token(tokenizer, self.config)
        return tokenizer

    def check(self, wanted: Wanted) -> None:
        """Raise `LightPeftError` unless it can be expected to answer; nothing is loaded for that."""
        if self.facts:
            trained = restore_task(self.facts)
            self._require_head(trained.head == wanted.head, str(Wanted.of(trained)), wanted)

    def _require_head(self, fits: bool, trained: str, wanted: Wanted) -> None:
        """Refuse to answer another kind of task than the one that it was trained for."""
        refusal = f"{self.name} was trained for {trained} and cannot answer {wanted}"
        require(fits, f"{refusal}; give a model of this task, or another task")

    def _require_trained(self, untrained: Sequence[str], wanted: Wanted) -> None:
        """Refuse to answer with weights that are random: those of modules that nothing was trained for."""
        require(
            not untrained,
            f"{self.name} has no weights for {', '.join(untrained)}, so its answers to {wanted} "
            "would be random; train it first: lightpeft run",
        )

    def _not_fitting(self, wanted: Wanted, why: Exception | str) -> LightPeftError:
        """The line about weights that are for something else."""
        classes = f" with {len(wanted.labels)} labels" if wanted.labels else ""
        reason = one_line(why)[-200:]
        return LightPeftError(f"{self.name} does not fit {wanted.what}{classes}: {reason}")

    def open(self, wanted: Wanted, base: PreTrainedModel | None = None) -> Model:
        """The live model in evaluation mode, with the head that is wanted, on the device at hand.

        Args:
            base: an adapter's, live, which is changed in place; None: it is loaded. A whole model has none.

        Raises:
            LightPeftError: it cannot answer, cannot be loaded, or its weights don't fit.
        """
        self.check(wanted)
        return to_device(self.load(wanted, base).eval())


@dataclass(frozen=True, kw_only=True)
class WholeModel(Found):
    """A transformers model, in a folder or on the hub."""

    form = "model"

    @classmethod
    def find(cls, place: str | Path, base: str | None, settings: Mapping[str, Any]) -> Self:
        """Wherever it is: `place` may also be a name on the hub."""
        return cls(name=str(place), model=_whole(place, base, settings))

    @cached_property
    def config(self) -> PretrainedConfig:
        """As transformers reads it.

        Raises:
            LightPeftError: it is not there, or a merged light model's without its plan.
        """
        config = load_model_config(self.model)
        alone = f"{self.name} has the weights of a pruned model, but not the plan of that: {MERGED} is missing"
        require(not isinstance(config, LightModelConfig), alone)
        return config

    @property
    def class_names(self) -> list[str] | None:
        """Those in its config, if it classifies."""
        classifies = any("SequenceClassification" in name for name in self.config.architectures or ())
        return list(self.config.id2label.values()) if classifies else None

    def load(self, wanted: Wanted, base: PreTrainedModel | None = None) -> PreTrainedModel:
        """As transformers does."""
        try:
            loaded = load_model(self.model, wanted.head, wanted.labels, to_prune=False)
        except LightPeftError as error:
            if "ignore_mismatched_sizes" not in str(error.__cause__):
                raise
            shapes = "weights have other shapes: other labels, or merged by other means than lightpeft export"
            raise self._not_fitting(wanted, shapes) from error
        self._require_trained(loaded.new_modules, wanted)
        return loaded.model


@dataclass(frozen=True, kw_only=True)
class MergedModel(Found):
    """A light model with PEFT merged into it, as `save_merged` writes it."""

    form = whole.ON_HUB.what

    @cached_property
    def config(self) -> PretrainedConfig:
        """Of the model itself, whether or not transformers can make anything of it."""
        folder = Path(self.model.name)
        return merged_config(folder, base_facts(self.description, folder / MERGED))

    @classmethod
    def find(cls, place: Path, base: str | None, settings: Mapping[str, Any]) -> Self:
        """What stands beside the weights says what they are."""
        description = read_merged(place)
        facts = said_of_task(description, place / MERGED)
        model = _whole(place, base, settings)
        return cls(name=str(place), model=model, description=description, facts=facts)

    def load(self, wanted: Wanted, base: PreTrainedModel | None = None) -> PreTrainedModel:
        """Straight into the cut layers."""
        return load_merged(self.model.name, dtype=self.model.dtype, attn_implementation=self.model.attn_implementation)


@dataclass(frozen=True, kw_only=True)
class _Adapter(Found):
    """Weights in a folder, over a base that is elsewhere."""

    folder: Path
    """Where the adapter is."""

    @cached_property
    def config(self) -> PretrainedConfig:
        """Of the base."""
        return self._base_config()

    def _base_config(self) -> PretrainedConfig:
        try:
            return load_model_config(self.model)
        except LightPeftError as error:
            raise LightPeftError(f"{self.folder} needs its base: {error}; give another place of it: --base") from error


@dataclass(frozen=True, kw_only=True)
class LightAdapter(_Adapter):
    """A plan and PEFT weights, as `LightModel` saves itself."""

    form = adapter_files.ON_HUB.what

    @classmethod
    def find(cls, place: Path, base: str | None, settings: Mapping[str, Any]) -> Self:
        """What stands beside the weights says what they are, and how the base was loaded."""
        description = read_description(place)
        saved = base_facts(description, place / DESCRIPTION)
        at_home = {"revision": saved.revision} if base is None else {}
        as_saved = {"gguf_file": saved.gguf_file, "dtype": saved.dtype, **at_home}
        model = _base(place, base or saved.id, {**as_saved, **settings})
        facts = said_of_task(description, place / DESCRIPTION)
        return cls(name=str(place), model=model, description=description, facts=facts, folder=place)

    @cached_property
    def config(self) -> PretrainedConfig:
        """Of the base, with the tokens that the adapter keeps."""
        return self._base_config() if self.vocabulary is None else cut_config(self._base_config(), self.vocabulary)

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """Which tokens of the base it has; None: all."""
        return vocabulary_in(self.folder, self.description)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's, or of that the tokens that the adapter keeps."""
        return super().tokenizer() if self.vocabulary is None else tokenizer_over(self.model, self.vocabulary)

    @property
    def plan(self) -> PrunePlan:
        """Which units of the base it has."""
        with explain_content_errors(self.folder / DESCRIPTION):
            return PrunePlan.from_dict(self.description["plan"])

    def load(self, wanted: Wanted | None = None, base: PreTrainedModel | None = None) -> LightModel:
        """With the head that it was trained with, whatever is wanted; in host memory, unless the base is elsewhere."""
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
    """An adapter as PEFT saves it, whoever made it."""

    form = "PEFT adapter"

    @classmethod
    def find(cls, place: Path, base: str | None, settings: Mapping[str, Any]) -> Self:
        """PEFT's own config says what it is."""
        adapter = read_adapter(place, allow_pickle=bool(settings.get("allow_pickle")))
        model = _base(place, base or adapter.base_model_name_or_path, settings)
        return cls(name=str(place), model=model, folder=place)

    def check(self, wanted: Wanted) -> None:
        """By what is said of its task, and by PEFT's name of it."""
        super().check(wanted)
        kind = self._settings().task_type
        self._require_head(kind in (None, wanted.head.task_type), f"PEFT's task type {kind}", wanted)

    def load(self, wanted: Wanted, base: PreTrainedModel | None = None) -> PeftModel:
        """Over the base with the head that is wanted, which the adapter or the base must have."""
        settings = self._settings()
        if base is None:
            loaded = load_model(self.model, wanted.head, wanted.labels, to_prune=False)
            brought = set(settings.modules_to_save or ())
            self._require_trained([name for name in loaded.new_modules if name not in brought], wanted)
            base = loaded.model
        try:
            check_fit(skeleton_of(base), settings, self.folder, exact=False)
            return load_adapter(base, self.folder, settings)
        except LightPeftError as error:
            raise self._not_fitting(wanted, error) from error

    def _settings(self) -> PeftConfig:
        """How PEFT builds it, read anew each time: PEFT changes what it is given."""
        return read_adapter(self.folder, allow_pickle=self.model.allow_pickle)


# -- what they have in common --------------------------------------------------------------------------------------


def _whole(place: str | Path, base: str | None, settings: Mapping[str, Any]) -> ModelConfig:
    """How a whole model is loaded."""
    require(base is None, f"{place} is a whole model, which has no base; leave --base out")
    return from_dict(ModelConfig, {**settings, "name": str(place)}, "model.")


def _base(folder: Path, name: str | None, settings: Mapping[str, Any]) -> ModelConfig:
    """How the base of an adapter is loaded."""
    require(name, f"{folder} does not name its base; give its name or folder: --base")
    return from_dict(ModelConfig, {**settings, "name": name}, "model.")


def said_of_task(description: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a description in a file says of the task; nothing if the model was made in a loop of one's own.

    Raises:
        LightPeftError: it is no description of a task.
    """
    with explain_content_errors(path):
        facts: dict[str, Any] = description["task"]
        if facts:
            restore_task(facts)
    return facts


def to_device(model: M) -> M:
    """The model on the device at hand; one that is quantised is put there on loading."""
    device = accelerator()
    if device is not None and not getattr(model, "is_quantized", False):
        model.to(device)
    return model
