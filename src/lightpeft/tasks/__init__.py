"""Tasks: which rows they have, how rows become text and batches, and what is measured.

A task is a `TaskEntry` (declared in `glue`, `superglue`, `choice_qa` or a run's YAML) of some kind; a kind is a `Task`
class with its columns.
"""

from lightpeft.console.bars import Progress, bar, silent
from lightpeft.tasks.answers import Answers, Metric
from lightpeft.tasks.entries.registry import ENTRIES, find_entry
from lightpeft.tasks.kinds.base import Task
from lightpeft.tasks.kinds.causal import CausalLMTask
from lightpeft.tasks.kinds.chat import ChatTask
from lightpeft.tasks.kinds.choice import TASKS, is_decoder, task_class
from lightpeft.tasks.kinds.classification import ClassificationTask
from lightpeft.tasks.kinds.generation import GenerationTask
from lightpeft.tasks.kinds.likelihood import LikelihoodTask
from lightpeft.tasks.kinds.multiple_choice import MultipleChoiceTask
from lightpeft.tasks.kinds.regression import RegressionTask
from lightpeft.tasks.kinds.span import SpanTask
from lightpeft.tasks.kinds.texts import encode_texts
from lightpeft.tasks.loading import convert, input_columns, load_task, load_test, restore_task, run_settings, task_facts
from lightpeft.tasks.metrics import METRICS
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
    "doubt_of_tokens",
    "encode_texts",
    "ensure_pad_token",
    "find_entry",
    "input_columns",
    "is_decoder",
    "load_task",
    "load_test",
    "padding_within",
    "read_rows",
    "restore_task",
    "run_settings",
    "share_at_limit",
    "silent",
    "task_class",
    "task_facts",
]
