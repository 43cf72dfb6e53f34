"""Metrics: functions of `Answers`, by name in one registry."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr

from lightpeft.app.tasks.answers import Answers, ClassMetric, MeanMetric, Metric
from lightpeft.app.tasks.text_metrics import by_answerability, text_match


@dataclass(frozen=True)
class NamedMetric:
    """A metric with the names of the values that it returns, the main one first."""

    values: tuple[str, ...]
    compute: Metric

    def __call__(self, answers: Answers) -> dict[str, float]:
        """Return the values of the metric by name."""
        return self.compute(answers)


def _score_accuracy(answers: Answers) -> dict[str, np.ndarray]:
    pairs = zip(answers.predictions, answers.references, strict=True)
    several = (list, tuple)
    right = [p in r if isinstance(r, several) else p == r for p, r in pairs]
    return {"accuracy": np.asarray(right, float)}


accuracy = MeanMetric(_score_accuracy)
"""Share of correct answers in [0, 1]; if an example has several references, any of them counts."""


def _f1_of_counts(counts: np.ndarray) -> dict[str, float]:
    by_class, _ = _f1_by_class(counts)
    return {"f1": float(by_class[1])} if len(counts) == 2 else {"f1": _macro(counts)}


f1 = ClassMetric(_f1_of_counts)
"""F1 of the second class if there are two classes, else macro F1."""


f1_macro = ClassMetric(lambda counts: {"f1_macro": _macro(counts)})
"""Macro F1: the mean F1 of the classes, as SuperGLUE measures CB."""


def _macro(counts: np.ndarray) -> float:
    """Return the mean F1 of the classes that occur among references or predictions."""
    by_class, there = _f1_by_class(counts)
    return float(by_class[there].mean())


def _f1_by_class(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return F1 per class (0 if undefined), float [classes], and a mask of the classes that occur, bool [classes]."""
    total = counts.sum(0) + counts.sum(1)
    return 2 * np.diag(counts) / np.maximum(total, 1), total > 0


def _matthews_of_counts(counts: np.ndarray) -> dict[str, float]:
    """Return Matthews' correlation coefficient of a confusion matrix (Gorodkin 2004, equation 8)."""
    right, answered, total = counts.sum(1, dtype=float), counts.sum(0, dtype=float), float(counts.sum())
    spread = (total**2 - answered @ answered) * (total**2 - right @ right)
    return {"matthews": float((np.trace(counts) * total - right @ answered) / math.sqrt(spread)) if spread else 0.0}


matthews = ClassMetric(_matthews_of_counts)
"""Matthews' correlation coefficient in [-1, 1]; 0 if all predictions are the same."""


def pearson(answers: Answers) -> dict[str, float]:
    """Return Pearson's correlation in [-1, 1]; 0 if predictions or references are constant."""
    return {"pearson": _correlation(pearsonr, answers)}


def spearman(answers: Answers) -> dict[str, float]:
    """Return Spearman's rank correlation in [-1, 1]; 0 if predictions or references are constant."""
    return {"spearman": _correlation(spearmanr, answers)}


def _squared_errors(answers: Answers) -> dict[str, np.ndarray]:
    difference = np.asarray(answers.predictions, float) - np.asarray(answers.references, float)
    return {"mse": difference**2}


squared_error = MeanMetric(_squared_errors)
"""Mean squared error."""


def multirc(answers: Answers) -> dict[str, float]:
    """Return MultiRC's F1a (F1 over all options) and the share of questions with all options right (Khashabi 2018)."""
    predictions, references = np.asarray(answers.predictions), np.asarray(answers.references)
    counts = np.bincount(2 * references + predictions, minlength=4).reshape(2, 2)
    groups = np.arange(len(answers)) if answers.groups is None else np.unique(answers.groups, return_inverse=True)[1]
    wrong = np.bincount(groups, weights=predictions != references)
    return {"f1a": _f1_of_counts(counts)["f1"], "exact_match": float(np.mean(wrong == 0))}


def language_modeling(answers: Answers) -> dict[str, float]:
    """Return perplexity, loss (nats per token) and token accuracy.

    Args:
        answers: each prediction is a tuple (summed cross-entropy in nats, correct tokens, tokens) of one example.
    """
    loss, right, tokens = np.sum(np.asarray(answers.predictions, float), axis=0)
    mean = loss / tokens
    return {
        "perplexity": math.exp(min(mean, 700.0)),
        "loss": float(mean),
        "accuracy": float(right / tokens),
    }


METRICS: dict[str, NamedMetric] = {
    "accuracy": NamedMetric(("accuracy",), accuracy),
    "f1": NamedMetric(("f1",), f1),
    "f1_macro": NamedMetric(("f1_macro",), f1_macro),
    "matthews": NamedMetric(("matthews",), matthews),
    "pearson": NamedMetric(("pearson",), pearson),
    "spearman": NamedMetric(("spearman",), spearman),
    "mse": NamedMetric(("mse",), squared_error),
    "multirc": NamedMetric(("f1a", "exact_match"), multirc),
    "record": NamedMetric(("f1", "exact_match"), text_match),
    "text_match": NamedMetric(("f1", "exact_match"), text_match),
    "answerability": NamedMetric(
        ("has_answer_f1", "has_answer_exact_match", "no_answer_f1", "no_answer_exact_match"), by_answerability
    ),
    "language_modeling": NamedMetric(("perplexity", "loss", "accuracy"), language_modeling),
}
"""Name in `TaskEntry.metrics` -> metric."""


def rename_values(metric: Metric, names: Mapping[str, str]) -> Metric:
    """Return the metric with some values under other names; a mean or class metric keeps its class."""

    def rename(values: dict[str, Any]) -> dict[str, Any]:
        return {names.get(name, name): value for name, value in values.items()}

    if isinstance(metric, MeanMetric):
        scores = metric.scores
        return MeanMetric(lambda answers: rename(scores(answers)))
    if isinstance(metric, ClassMetric):
        of_counts = metric.of_counts
        return ClassMetric(lambda counts: rename(of_counts(counts)))
    return lambda answers: rename(metric(answers))


def _correlation(measure: Callable[..., Any], answers: Answers) -> float:
    predictions, references = np.asarray(answers.predictions, float), np.asarray(answers.references, float)
    if len(predictions) < 2 or np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0
    return float(measure(predictions, references).statistic)
