"""Tasks: which rows they have, how rows become text and batches, and what is measured.

A task is a `TaskEntry` (declared in `glue`, `superglue`, `choice_qa` or a run's YAML) of some kind; a kind is a `Task`
class: its columns, and how a model answers them.
"""

from lightpeft.app.tasks.answers import Answers, Columns, Metric, Outcome
from lightpeft.app.tasks.entries.registry import ENTRIES, find_entry
from lightpeft.app.tasks.kinds.base import Task
from lightpeft.app.tasks.kinds.causal import CausalLMTask
from lightpeft.app.tasks.kinds.chat import ChatTask
from lightpeft.app.tasks.kinds.classification import ClassificationByLikelihood, ClassificationTask
from lightpeft.app.tasks.kinds.generation import GenerationTask
from lightpeft.app.tasks.kinds.likelihood import LikelihoodTask
from lightpeft.app.tasks.kinds.multiple_choice import MultipleChoiceByLikelihood, MultipleChoiceTask
from lightpeft.app.tasks.kinds.registry import KINDS, task_class
from lightpeft.app.tasks.kinds.regression import RegressionTask
from lightpeft.app.tasks.kinds.span import SpanTask
from lightpeft.app.tasks.loading import (
    convert,
    input_columns,
    load_task,
    load_test,
    restore_task,
    run_settings,
    task_facts,
)
from lightpeft.app.tasks.metrics import METRICS
from lightpeft.app.tasks.respondent import Respondent
from lightpeft.app.tasks.rows.reading import read_rows
from lightpeft.app.tasks.tokens import (
    Collator,
    check_max_length,
    check_tokens,
    padding_within,
    share_at_limit,
)
from lightpeft.app.tasks.vocabulary import task_tokens
from lightpeft.app.tasks.worth import answers_are_classes, points_a_nat

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
    "convert",
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
