"""All kinds by name, and the class that answers a kind on a model: by a trained head, or by likelihood."""

from __future__ import annotations

from transformers import PretrainedConfig

from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.kinds.causal import CausalLMTask
from lightpeft.app.tasks.kinds.chat import ChatTask
from lightpeft.app.tasks.kinds.classification import ClassificationByLikelihood, ClassificationTask
from lightpeft.app.tasks.kinds.generation import GenerationTask
from lightpeft.app.tasks.kinds.multiple_choice import MultipleChoiceByLikelihood, MultipleChoiceTask
from lightpeft.app.tasks.kinds.regression import RegressionTask
from lightpeft.app.tasks.kinds.span import SpanTask
from lightpeft.config import AnswerBy
from lightpeft.errors import LightPeftError, require
from lightpeft.models.task_heads import CAUSAL_LM, TaskHead

TASK_KINDS: dict[str, type[Task]] = {
    "classification": ClassificationTask,
    "regression": RegressionTask,
    "multiple-choice": MultipleChoiceTask,
    "span": SpanTask,
    "generation": GenerationTask,
    "chat": ChatTask,
    "causal-lm": CausalLMTask,
}
"""Name of a kind -> its class."""
BY_LIKELIHOOD: dict[str, type[Task]] = {
    "classification": ClassificationByLikelihood,
    "multiple-choice": MultipleChoiceByLikelihood,
}
"""Name of a kind whose options a language model can score -> its class that answers by likelihood."""


def task_class(kind: str, answer: AnswerBy, model: PretrainedConfig | None) -> type[Task]:
    """Return the class that answers `kind` on a model.

    Args:
        answer: "head", "likelihood", or "auto": a head if the model has it, else likelihood.
        model: configuration of the foundation model; None: one that has every head.

    Raises:
        LightPeftError: the model cannot answer this kind, or not in this way.
    """
    by_head, by_likelihood = TASK_KINDS[kind], BY_LIKELIHOOD.get(kind)
    if answer == "auto" and by_likelihood is not None and not _fits(by_head.head, model):
        lacking = f"{by_head.head.lacking} and {CAUSAL_LM.lacking}"
        refusal = f"{_model_name(model)} {lacking}, and {kind} needs one of them; give another model"
        require(_fits(CAUSAL_LM, model), refusal)
        return by_likelihood
    if answer != "likelihood":
        instead = "give another model" if by_likelihood is None else "set data.answer to likelihood"
        refusal = f"{_model_name(model)} {by_head.head.lacking}, which {kind} needs; {instead}"
        require(_fits(by_head.head, model), refusal)
        return by_head
    if by_likelihood is None:
        scorable = ", ".join(BY_LIKELIHOOD)
        raise LightPeftError(f"data.answer: likelihood cannot answer {kind}; set it to head, or use {scorable}")
    refusal = (
        f"data.answer is likelihood, which needs a causal language model; {_model_name(model)} is none: set it to head"
    )
    require(_fits(CAUSAL_LM, model), refusal)
    return by_likelihood


def _fits(head: TaskHead, model: PretrainedConfig | None) -> bool:
    return model is None or head.fits(model)


def _model_name(model: PretrainedConfig | None) -> str:
    return "the model" if model is None else model.model_type
