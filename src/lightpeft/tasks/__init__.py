"""Tasks: which columns they read, how rows become batches. A new task is one class and one entry in `TASKS`."""

from lightpeft.config import DataConfig, TaskKind
from lightpeft.tasks.base import Task, split_rows
from lightpeft.tasks.causal import CausalLMTask
from lightpeft.tasks.classification import ClassificationTask, encode_texts, text_collator
from lightpeft.tasks.progress import Progress, bar, silent
from lightpeft.tasks.reading import read_rows
from lightpeft.tasks.tokens import Collator, check_max_length, ensure_pad_token

__all__ = [
    "TASKS",
    "CausalLMTask",
    "ClassificationTask",
    "Collator",
    "Progress",
    "Task",
    "bar",
    "check_max_length",
    "encode_texts",
    "ensure_pad_token",
    "load_task",
    "read_rows",
    "silent",
    "text_collator",
]

TASKS: dict[TaskKind, type[Task]] = {
    "classification": ClassificationTask,
    "causal-lm": CausalLMTask,
}
"""Task kind (`data.task`) -> task."""


def load_task(config: DataConfig) -> Task:
    """Read, check and split the rows that `config` names.

    Raises:
        LightPeftError: a source cannot be read, or its rows don't fit the task.
    """
    kind = TASKS[config.task]
    train = read_rows(config.train, "data.train")
    kind.check(train, config, "data.train")
    test = None
    if config.test is not None:
        test = read_rows(config.test, "data.test")
        kind.check(test, config, "data.test")
    labels = kind.label_set(train, config)
    train, test = split_rows(train, test, config)
    kind.check_split(train, test, labels, config)
    return kind(config, train, test, labels)
