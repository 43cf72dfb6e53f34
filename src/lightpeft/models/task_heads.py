"""What of a model answers a task: its head, how transformers loads it and PEFT calls it, and which models have it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import TaskType
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)


def _anywhere(config: PretrainedConfig) -> bool:
    return True


@dataclass(frozen=True)
class TaskHead:
    """One sort of head; two of the same name are the same."""

    name: str
    """What error lines call it."""
    auto: Any = field(compare=False)
    """transformers' class that picks the model."""
    task_type: TaskType | None = field(compare=False)
    """PEFT's name of what the model is for; None: PEFT has none, and passes inputs on as they are."""
    fits: Callable[[PretrainedConfig], bool] = field(default=_anywhere, compare=False)
    """Whether a model of that configuration can have it."""
    lacking: str = field(default="", compare=False)
    """What is said of a model that cannot: "bert ...", which a task needs."""
    outputs: Literal["classes", "number", "own"] = field(default="own", compare=False)
    """What it gives: one output a class of the task, one number, or what its architecture says."""
    architectures: Any = field(default=None, compare=False)
    """transformers' table from configuration to model class, where the model may call its base otherwise than the
    family's checkpoints do (see `loading.base_names`)."""

    def configure(self, config: PretrainedConfig, labels: Sequence[str]) -> None:
        """Set in a model's config how many outputs the head has; `labels` are the names of the classes in order."""
        if self.outputs == "number":
            config.num_labels = 1  # by which transformers knows that the loss is the squared error
        if self.outputs == "classes":
            config.num_labels = len(labels)
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: index for index, label in enumerate(labels)}

    def __str__(self) -> str:
        return self.name


def is_decoder(config: PretrainedConfig) -> bool:
    """Whether a model is a language model that reads from left to right only, so that no token has seen the next one.

    transformers has families that read both ways as language models as well; of those, models that were made to look
    back only say so in their config.
    """
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        return False
    own_code = getattr(config, "auto_map", None) or {}
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in own_code


CLASSIFICATION = TaskHead("classification", AutoModelForSequenceClassification, TaskType.SEQ_CLS, outputs="classes")
REGRESSION = TaskHead("regression", AutoModelForSequenceClassification, TaskType.SEQ_CLS, outputs="number")
MULTIPLE_CHOICE = TaskHead(
    "multiple-choice",
    AutoModelForMultipleChoice,
    None,
    fits=lambda config: type(config) in MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    lacking="has no multiple-choice head",
)
SPAN = TaskHead(
    "span",
    AutoModelForQuestionAnswering,
    TaskType.QUESTION_ANS,
    fits=lambda config: type(config) in MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    lacking="has no question answering head",
    architectures=MODEL_FOR_QUESTION_ANSWERING_MAPPING,
)
CAUSAL_LM = TaskHead(
    "causal-lm",
    AutoModelForCausalLM,
    TaskType.CAUSAL_LM,
    fits=is_decoder,
    lacking="is no causal language model",
)
