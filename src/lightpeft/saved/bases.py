"""What a light model says of the base that it was made from, and that base, loaded: nothing else it says counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from transformers import PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

from lightpeft.config import ModelConfig
from lightpeft.config.validation import check_values, from_dict
from lightpeft.errors import LightPeftError, require
from lightpeft.files import understandable
from lightpeft.files.foreign import parsing
from lightpeft.models.loading import (
    CUTTABLE,
    base_names,
    check_checkpoint,
    keep_own_names,
    quantisation_method,
    quietly,
)
from lightpeft.saved.streaming import Stream


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """What a task has set in the base's configuration."""

    pad_token_id: int | None = None
    id2label: dict[str, str] | None = None
    """Class number -> name."""

    def arguments(self) -> dict[str, Any]:
        """As `from_pretrained` takes them."""
        settings: dict[str, Any] = {} if self.pad_token_id is None else {"pad_token_id": self.pad_token_id}
        if self.id2label is not None:
            settings["id2label"] = {int(number): label for number, label in self.id2label.items()}
            settings["label2id"] = {label: number for number, label in settings["id2label"].items()}
        return settings


@dataclass(frozen=True, kw_only=True)
class BaseFacts:
    """The base of a light adapter or a merged model, as the file beside its weights describes it.

    Raises:
        LightPeftError: a value that no light model is saved with.
    """

    id: str
    """Hub name or folder."""
    revision: str | None = None
    """Commit on the hub."""
    model_type: str
    architecture: str
    """Class of transformers."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    fingerprint: str
    config: HeadSettings
    gguf_file: str | None = None
    quantisation: dict[str, Any] | None = None
    """In transformers' words; None: it was not."""

    def __post_init__(self) -> None:
        check_values(self)
        plain = self.gguf_file is None or Path(self.gguf_file).name == self.gguf_file
        require(plain, f"gguf_file is {self.gguf_file!r}; it must be the name of a file beside the base")
        if self.quantisation is not None:
            method = quantisation_method(self.quantisation)
            require(method in CUTTABLE, f"quantisation is by {method}; light models know {' and '.join(CUTTABLE)}")

    def place(self, elsewhere: str | Path | None = None) -> ModelConfig:
        """Where the base is; one that was moved has no revision.

        Raises:
            LightPeftError: nobody says where.
        """
        name = self.id if elsewhere is None else str(elsewhere)
        require(name, "the light adapter does not name its base; give one: load_light(folder, base=...)")
        revision = self.revision if elsewhere is None else None
        return ModelConfig(name=name, revision=revision, gguf_file=self.gguf_file)


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What a description has besides, of which kind."""

    plan: dict[str, Any]
    task: dict[str, Any]
    metrics: dict[str, Any]


def check_parts(description: Mapping[str, Any], path: Path) -> None:
    """Check that a description that was read from a file has the parts that light models are described by.

    Raises:
        LightPeftError: a part is missing, or of another kind.
    """
    with understandable(path):
        from_dict(_Parts, {name: description[name] for name in ("plan", "task", "metrics")})
    base_facts(description, path)


def base_facts(description: Mapping[str, Any], path: Path) -> BaseFacts:
    """The base in a description that was read from a file.

    Raises:
        LightPeftError: a part is missing, unknown, or of another kind.
    """
    with understandable(path):
        return from_dict(BaseFacts, description["base"], "base.")


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
    attention: str | None = None,
    stream: Stream | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """Load the base of a light adapter, dense or into a stream, with the head that the adapter was trained with.

    Args:
        model: where it is, and whether code or pickled weights of it may be read; the rest is as it was saved.
        dtype: of the weights; "auto": as it was.
        attention: attention backend; None: the one it would use.
        stream: to read it into.

    Returns:
        It, and the names of weights that its checkpoint does not have.

    Raises:
        LightPeftError: it is not there, damaged, or needs what the settings do not allow.
    """
    architecture = architecture_of(saved, "load the base yourself and pass it as base=")
    if stream is not None:
        architecture = stream.loader(architecture)
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    names = base_names(architecture)
    failed, instead = f"base {model.name} cannot be loaded", "give another place: base=..."
    with parsing(failed, instead), quietly():
        if saved.quantisation:
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
    return loaded, sorted(info["missing_keys"])


def _checked(model: ModelConfig, failed: str, instead: str) -> dict[str, Any]:
    try:
        return check_checkpoint(model, weights=True)
    except LightPeftError as error:
        raise LightPeftError(f"{failed}: {error}; {instead}") from error
