"""Classes of a model and labels of the data, matched by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lightpeft.app.tasks.answers import Answers
from lightpeft.errors import require
from lightpeft.models.task_heads import DEFAULT_LABEL

SHOWN_LABELS = 5
"""Most labels that an error message lists."""


def class_order(classes: Sequence[str], labels: Sequence[str], name: str) -> list[str]:
    """Return the data's labels in the order of a model's classes.

    Names that differ are compared without case. Default class names (LABEL_0, ...), and labels that are numbers from 0,
    keep their order.

    Args:
        classes: class names of the model.
        labels: label names of the data.
        name: name of the model, for the error message.

    Raises:
        LightPeftError: the names differ.
    """
    if set(labels) <= set(classes):
        return list(classes)
    spelled = {label.casefold(): label for label in labels}
    if spelled.keys() <= {name.casefold() for name in classes}:
        return [spelled.get(name.casefold(), name) for name in classes]
    numbers = [str(number) for number in range(len(classes))]
    if set(labels) <= set(numbers):
        return numbers
    unnamed = all(DEFAULT_LABEL.fullmatch(name) for name in classes) and len(classes) == len(labels)
    require(
        unnamed,
        f"{name} has {len(classes)} classes ({join_names(classes)}), but the data have {len(labels)} labels "
        f"({join_names(labels)}); give rows with the model's labels, or a model that was trained on these",
    )
    return list(labels)


def join_names(names: Sequence[str]) -> str:
    """Return the first `SHOWN_LABELS` names, for an error message."""
    return ", ".join(names[:SHOWN_LABELS]) + (", ..." if len(names) > SHOWN_LABELS else "")


def renumber_classes(answers: Answers, labels: Sequence[str], order: Sequence[str]) -> Answers:
    """Return answers with class numbers as indices of `order` in place of `labels`; `order` contains all labels."""
    if list(labels) == list(order):
        return answers
    numbers = [list(order).index(name) for name in labels]
    probabilities = None
    if answers.probabilities is not None:
        probabilities = np.zeros((len(answers), len(order)), dtype=answers.probabilities.dtype)
        probabilities[:, numbers] = answers.probabilities
    return replace(
        answers,
        predictions=[numbers[number] for number in answers.predictions],
        references=[numbers[number] for number in answers.references],
        probabilities=probabilities,
    )
