"""Task heads: their classes in transformers, their task types in PEFT, and the models that have them."""

from __future__ import annotations

import re
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

DEFAULT_LABEL = re.compile(r"LABEL_\d+")
"""Class names that transformers gives where a task has none."""


def _anywhere(config: PretrainedConfig) -> bool:
    return True


@dataclass(frozen=True)
class TaskHead:
    """One kind of head; heads with equal names are equal."""

    name: str
    """Name in error messages."""
    auto: Any = field(compare=False)
    """Auto class of transformers that loads the model."""
    task_type: TaskType | None = field(compare=False)
    """Task type of PEFT; None: PEFT has none for it, and passes inputs on unchanged."""
    fits: Callable[[PretrainedConfig], bool] = field(default=_anywhere, compare=False)
    """Function that returns whether a model with this configuration can have the head."""
    lacking: str = field(default="", compare=False)
    """Predicate of the error message about a model that cannot: "bert ...", which a task needs."""
    outputs: Literal["classes", "number", "own"] = field(default="own", compare=False)
    """Outputs: one for each class of the task, one number, or those of the architecture."""
    architectures: Any = field(default=None, compare=False)
    """Table of transformers from configuration to model class, for heads that may name their base unlike the family's
    checkpoints (see `loading.base_names`)."""

    def configure(self, config: PretrainedConfig, labels: Sequence[str]) -> None:
        """Set the number of outputs of the head in a model's config; `labels` are the names of the classes in order."""
        if self.outputs == "number":
            config.num_labels = 1  # for which transformers uses the squared error as the loss
        if self.outputs == "classes":
            config.num_labels = len(labels)
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: index for index, label in enumerate(labels)}

    def __str__(self) -> str:
        return self.name


def is_decoder(config: PretrainedConfig) -> bool:
    """Return whether a model is a causal language model, in which no token attends to later ones.

    transformers lists bidirectional families among causal language models as well; of these, causal models have
    `is_decoder` in their config.
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
    lacking="is not a causal language model",
)
