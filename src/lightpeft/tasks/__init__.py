"""Tasks: which rows they have, how rows become text and batches, and what is measured.

A task is a `TaskEntry` (declared in `glue`, `superglue`, `choice_qa` or a run's YAML) of some kind; a kind is a `Task`
class: its columns, and how a model answers them.
"""

from lightpeft.tasks.answers import Answers, Columns, Metric, Outcome
from lightpeft.tasks.entries.registry import ENTRIES, find_entry
from lightpeft.tasks.kinds.base import Task
from lightpeft.tasks.kinds.causal import CausalLMTask
from lightpeft.tasks.kinds.chat import ChatTask
from lightpeft.tasks.kinds.classification import ClassificationByLikelihood, ClassificationTask
from lightpeft.tasks.kinds.generation import GenerationTask
from lightpeft.tasks.kinds.likelihood import LikelihoodTask
from lightpeft.tasks.kinds.multiple_choice import MultipleChoiceByLikelihood, MultipleChoiceTask
from lightpeft.tasks.kinds.registry import KINDS, task_class
from lightpeft.tasks.kinds.regression import RegressionTask
from lightpeft.tasks.kinds.span import SpanTask
from lightpeft.tasks.loading import convert, input_columns, load_task, load_test, restore_task, run_settings, task_facts
from lightpeft.tasks.metrics import METRICS
from lightpeft.tasks.respondent import Respondent
from lightpeft.tasks.rows.reading import read_rows
from lightpeft.tasks.tokens import (
    Collator,
    check_max_length,
    check_tokens,
    check_vocabulary,
    doubt_of_tokens,
    ensure_pad_token,
    padding_within,
    share_at_limit,
)
from lightpeft.tasks.vocabulary import Coverage, coverage, task_tokens
from lightpeft.tasks.worth import answers_are_classes, points_a_nat

__all__ = [
    "ENTRIES",
    "KINDS",
    "METRICS",
    "Answers",
    "CausalLMTask",
    "ChatTask",
    "ClassificationByLikelihood",
    "ClassificationTask",
    "Collator",
    "Columns",
    "Coverage",
    "GenerationTask",
    "LikelihoodTask",
    "Metric",
    "MultipleChoiceByLikelihood",
    "MultipleChoiceTask",
    "Outcome",
    "RegressionTask",
    "Respondent",
    "SpanTask",
    "Task",
    "answers_are_classes",
    "check_max_length",
    "check_tokens",
    "check_vocabulary",
    "convert",
    "coverage",
    "doubt_of_tokens",
    "encode_texts",
    "ensure_pad_token",
    "find_entry",
    "input_columns",
    "load_task",
    "load_test",
    "padding_within",
    "points_a_nat",
    "read_rows",
    "restore_task",
    "run_settings",
    "share_at_limit",
    "task_class",
    "task_facts",
    "task_tokens",
]
