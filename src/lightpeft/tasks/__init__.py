"""Tasks: which rows they have, how rows become text and batches, and what is measured.

A task is a `TaskEntry` (declared in `glue`, `superglue`, `choice_qa` or a run's YAML) of some kind; a kind is a `Task`
class with its columns.
"""

from lightpeft.tasks.answering import TASKS, is_decoder, task_class
from lightpeft.tasks.answers import Answers, Metric
from lightpeft.tasks.base import Task
from lightpeft.tasks.causal import CausalLMTask
from lightpeft.tasks.chat import ChatTask
from lightpeft.tasks.classification import ClassificationTask
from lightpeft.tasks.entries import ENTRIES, find_entry
from lightpeft.tasks.generation import GenerationTask
from lightpeft.tasks.likelihood import LikelihoodTask
from lightpeft.tasks.loading import (
    convert,
    input_columns,
    load_task,
    load_test,
    restore_task,
    run_settings,
    task_facts,
)
from lightpeft.tasks.metrics import METRICS
from lightpeft.tasks.multiple_choice import MultipleChoiceTask
from lightpeft.tasks.progress import Progress, bar, silent
from lightpeft.tasks.reading import read_rows
from lightpeft.tasks.regression import RegressionTask
from lightpeft.tasks.span import SpanTask
from lightpeft.tasks.texts import encode_texts
from lightpeft.tasks.tokens import (
    Collator,
    check_max_length,
    check_tokens,
    check_vocabulary,
    ensure_pad_token,
    share_at_limit,
)

__all__ = [
    "ENTRIES",
    "METRICS",
    "TASKS",
    "Answers",
    "CausalLMTask",
    "ChatTask",
    "ClassificationTask",
    "Collator",
    "GenerationTask",
    "LikelihoodTask",
    "Metric",
    "MultipleChoiceTask",
    "Progress",
    "RegressionTask",
    "SpanTask",
    "Task",
    "bar",
    "check_max_length",
    "check_tokens",
    "check_vocabulary",
    "convert",
    "encode_texts",
    "ensure_pad_token",
    "find_entry",
    "input_columns",
    "is_decoder",
    "load_task",
    "load_test",
    "read_rows",
    "restore_task",
    "run_settings",
    "share_at_limit",
    "silent",
    "task_class",
    "task_facts",
]
