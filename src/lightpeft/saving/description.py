"""Description of a light model, saved beside its weights: base, plan, task and metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig

from lightpeft.config import ModelConfig
from lightpeft.config.validation import check_values, from_dict
from lightpeft.errors import require
from lightpeft.files import explain_content_errors
from lightpeft.models.families.family_table import family_of
from lightpeft.models.families.spec import Stack
from lightpeft.models.loading import CUTTABLE, quantization_method
from lightpeft.models.unwrap import transformers_model
from lightpeft.models.vocabulary.cutting import vocabulary_of
from lightpeft.models.vocabulary.kept import Vocabulary
from lightpeft.plans.block_plan import BlockPlan
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.plans.structure import BlockSpec
from lightpeft.profiling.surroundings import versions


class Described(Protocol):
    """Interface of a `LightModel`: its plan, task and metrics."""

    light_plan: PrunePlan
    light_task: dict[str, Any]
    light_metrics: dict[str, Any]
    light_intervals: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """Values that a task sets in the base's configuration."""

    pad_token_id: int | None = None
    id2label: dict[str, str] | None = None
    """Class number -> name."""

    def arguments(self) -> dict[str, Any]:
        """Return the values as keyword arguments of `from_pretrained`."""
        settings: dict[str, Any] = {} if self.pad_token_id is None else {"pad_token_id": self.pad_token_id}
        if self.id2label is not None:
            settings["id2label"] = {int(number): label for number, label in self.id2label.items()}
            settings["label2id"] = {label: number for number, label in settings["id2label"].items()}
        return settings


@dataclass(frozen=True, kw_only=True)
class BaseFacts:
    """The base of a light adapter or a merged model, from the description beside its weights.

    Raises:
        LightPeftError: a value that lightpeft does not write.
    """

    id: str
    """Hub name or folder."""
    revision: str | None = None
    """Commit on the hub."""
    model_type: str
    architecture: str
    """Name of the transformers class."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    fingerprint: str
    config: HeadSettings
    gguf_file: str | None = None
    quantization: dict[str, Any] | None = None
    """Settings of transformers' quantization config; None: not quantized."""

    def __post_init__(self) -> None:
        check_values(self)
        plain = self.gguf_file is None or Path(self.gguf_file).name == self.gguf_file
        require(plain, f"base.gguf_file is {self.gguf_file!r}; it must be a file name without a folder")
        if self.quantization is not None:
            method = quantization_method(self.quantization)
            require(method == CUTTABLE, f"base.quantization is by {method}; only {CUTTABLE} is supported")

    def place(self, elsewhere: str | Path | None = None) -> ModelConfig:
        """Return the settings to load the base from its recorded place, or from another one without a revision.

        Args:
            elsewhere: name or folder that replaces the recorded one; None: the recorded one.

        Raises:
            LightPeftError: the description names no base, and `elsewhere` is None.
        """
        name = self.id if elsewhere is None else str(elsewhere)
        require(name, "the light adapter does not name its base; pass one: load_light(folder, base=...)")
        revision = self.revision if elsewhere is None else None
        return ModelConfig(name=name, revision=revision, gguf_file=self.gguf_file)


def base_facts(description: Mapping[str, Any], path: Path) -> BaseFacts:
    """Return the base in a description.

    Args:
        description: content of the description file.
        path: that file, for error lines.

    Raises:
        LightPeftError: a value is missing, unknown, or of another type.
    """
    with explain_content_errors(path):
        return from_dict(BaseFacts, description["base"], "base.")


def facts_of(model: Described) -> dict[str, Any]:
    """Return the description of a light model for JSON: base, plan, task, metrics, versions."""
    inner = transformers_model(cast(nn.Module, model))
    config = inner.config
    return {
        "base": {
            "id": config.name_or_path,
            "revision": getattr(inner, "light_revision", None),
            "model_type": config.model_type,
            "architecture": type(inner).__name__,
            "dtype": str(inner.dtype).removeprefix("torch."),
            "fingerprint": model.light_plan.fingerprint,
            "config": _head_settings(config, vocabulary_of(inner)),
            "gguf_file": getattr(inner, "light_gguf_file", None),
            "quantization": _quantization(config),
        },
        "tokens": _token_counts(vocabulary_of(inner)),
        "plan": model.light_plan.to_dict(),
        "per_layer_config": per_layer_config(config.model_type, model.light_plan),
        "task": model.light_task,
        "metrics": model.light_metrics,
        "intervals": model.light_intervals,
        "peft_type": next(str(config.peft_type.value) for config in cast(PeftModel, model).peft_config.values()),
        "versions": versions(),
    }


def without_metrics(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description without metrics, for a model that is about to change."""
    return {**facts, "metrics": {}, "intervals": {}}


def _token_counts(vocabulary: Vocabulary | None) -> dict[str, int] | None:
    """Return the number of kept tokens, and of the base's tokens; None: all are kept."""
    return None if vocabulary is None else {"kept": len(vocabulary), "of": vocabulary.size}


def _head_settings(config: PretrainedConfig, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """Return config values that the task has set, with token ids of the base."""
    settings = {"pad_token_id": config.pad_token_id} if hasattr(config, "pad_token_id") else {}
    if vocabulary is not None and settings.get("pad_token_id") in range(len(vocabulary)):
        settings["pad_token_id"] = vocabulary.kept[settings["pad_token_id"]]
    if any("Classification" in name for name in getattr(config, "architectures", None) or ()) or config.id2label:
        settings["id2label"] = {str(index): label for index, label in config.id2label.items()}
    return settings


def _quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return transformers' quantization config of the base as plain data; None: not quantized."""
    settings = getattr(config, "quantization_config", None)
    return json.loads(settings.to_json_string(use_diff=False)) if settings is not None else None


def per_layer_config(model_type: str, plan: PrunePlan) -> dict[str, dict[str, int]]:
    """Return the widths of all blocks in the schema of transformers' `per_layer_config`: layer -> config key -> value.

    It is empty for encoder-decoders, whose two stacks the schema does not cover.
    """
    stacks = family_of(model_type).stacks
    if len(stacks) > 1:  # the schema numbers one stack of layers only
        return {}
    return {
        str(spec.index): {
            "num_attention_heads": len(kept.heads),
            "num_key_value_heads": len(kept.kv_heads),
            **_ffn_config(stacks[0], spec, kept),
        }
        for spec, kept in plan.parts
    }


def _ffn_config(stack: Stack, spec: BlockSpec, kept: BlockPlan) -> dict[str, int]:
    """Return the widths of a block's FFN and of its routed experts: config key -> value."""
    routed, result = stack.experts, {}
    key = stack.width_key_of(spec.projections)
    if not spec.experts or (spec.neurons and key):
        result[key or "intermediate_size"] = len(kept.neurons)
    if routed is not None and spec.experts:
        result |= {routed.count_key: len(kept.experts), routed.width_key: kept.expert_width}
    return result
