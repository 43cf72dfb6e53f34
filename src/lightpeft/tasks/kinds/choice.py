"""Which task class answers a kind of rows on a model: by a head that is trained, or by likelihood."""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
)

from lightpeft.config import AnswerBy, TaskKind
from lightpeft.errors import require
from lightpeft.tasks.kinds.base import Task
from lightpeft.tasks.kinds.causal import CausalLMTask
from lightpeft.tasks.kinds.chat import ChatTask
from lightpeft.tasks.kinds.classification import ClassificationTask
from lightpeft.tasks.kinds.generation import GenerationTask
from lightpeft.tasks.kinds.likelihood import SCORABLE, LikelihoodTask
from lightpeft.tasks.kinds.multiple_choice import MultipleChoiceTask
from lightpeft.tasks.kinds.regression import RegressionTask
from lightpeft.tasks.kinds.span import SpanTask

TASKS: dict[TaskKind, type[Task]] = {
    "classification": ClassificationTask,
    "regression": RegressionTask,
    "multiple-choice": MultipleChoiceTask,
    "span": SpanTask,
    "generation": GenerationTask,
    "chat": ChatTask,
    "causal-lm": CausalLMTask,
}
"""Kind of rows -> the task class with their columns and head."""


def task_class(kind: TaskKind, answer: AnswerBy, model: PretrainedConfig | None) -> type[Task]:
    """The class that answers `kind` on a model.

    Args:
        model: configuration of the foundation model; None: one that has every head.

    Raises:
        LightPeftError: the model cannot answer so.
    """
    _check_readable(kind, model)
    by_options = kind == "multiple-choice"
    if answer == "auto":
        answer = "likelihood" if by_options and not _has_options_head(model) else "head"
        possible = answer == "head" or model is None or is_decoder(model)
        require(possible, f"{_name(model)} has neither a multiple-choice head nor reads from left to right only")
    if answer == "head":
        possible = not by_options or _has_options_head(model)
        require(possible, f"{_name(model)} has no multiple-choice head; set data.answer to likelihood")
        return TASKS[kind]
    require(kind in SCORABLE, f"data.answer is likelihood, which cannot answer {kind}; it can {', '.join(SCORABLE)}")
    require(
        model is None or is_decoder(model),
        f"data.answer is likelihood, which needs a causal language model; {_name(model)} is none: set it to head",
    )
    return LikelihoodTask


def _check_readable(kind: TaskKind, model: PretrainedConfig | None) -> None:
    """Raise `LightPeftError` where a model lacks the one head that can answer a kind."""
    if model is None:
        return
    spans = kind != "span" or model.model_type in MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES
    require(spans, f"{_name(model)} has no question answering head, which {kind} needs; give another model")
    writes = kind not in ("generation", "chat", "causal-lm") or is_decoder(model)
    require(writes, f"{kind} needs a causal language model; {_name(model)} is none: give another model")


def _has_options_head(model: PretrainedConfig | None) -> bool:
    return model is None or model.model_type in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES


def is_decoder(model: PretrainedConfig) -> bool:
    """Whether a model is a language model that reads from left to right only, so that no token has seen the next one.

    transformers has families that read both ways as language models as well; of those, models that were made to look
    back only say so in their config.
    """
    if model.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(model, "is_decoder", False):
        return False
    own_code = getattr(model, "auto_map", None) or {}
    return type(model) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in own_code


def _name(model: PretrainedConfig | None) -> str:
    return "the model" if model is None else model.model_type
