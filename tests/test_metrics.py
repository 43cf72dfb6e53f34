"""Metrics against values worked out by hand or taken from documentation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightpeft.app.tasks.answers import Answers, MeanMetric
from lightpeft.app.tasks.metrics import METRICS, rename_values

BINARY = Answers([1, 1, 0, 0, 1, 0], [1, 0, 0, 1, 1, 0])
"""Two true and one false positive, two true and one false negative."""
THREE = Answers([0, 1, 1, 2, 2, 2], [0, 1, 2, 2, 2, 0])


@pytest.mark.parametrize(
    ("name", "answers", "expected"),
    [
        ("accuracy", BINARY, {"accuracy": 4 / 6}),
        ("accuracy", Answers(["a", "b"], [["a", "c"], ["a"]]), {"accuracy": 0.5}),
        ("f1", BINARY, {"f1": 2 / 3}),
        # recall and precision: class 0 1/2 and 1, class 1 1 and 1/2, class 2 2/3 and 2/3
        ("f1", THREE, {"f1": (2 / 3 + 2 / 3 + 2 / 3) / 3}),
        ("f1_macro", THREE, {"f1_macro": 2 / 3}),
        ("f1_macro", BINARY, {"f1_macro": 2 / 3}),
        ("matthews", BINARY, {"matthews": (2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3)}),
        # the example of scikit-learn's documentation of matthews_corrcoef
        ("matthews", Answers([1, 0, 1, 1], [1, 1, 1, 0]), {"matthews": -1 / 3}),
        ("matthews", Answers([1, 1, 1], [1, 0, 1]), {"matthews": 0.0}),
        ("pearson", Answers([1.0, 2.0, 4.0], [1.0, 2.0, 3.0]), {"pearson": 3 / math.sqrt(2 * 14 / 3)}),
        # the example of scipy's documentation of spearmanr
        ("spearman", Answers([5.0, 6.0, 7.0, 8.0, 7.0], [1.0, 2.0, 3.0, 4.0, 5.0]), {"spearman": 0.8207826816681233}),
        ("pearson", Answers([2.0, 2.0], [1.0, 3.0]), {"pearson": 0.0}),
        ("spearman", Answers([2.0], [1.0]), {"spearman": 0.0}),
        ("mse", Answers([1.0, 2.0], [3.0, 2.5]), {"mse": (4 + 0.25) / 2}),
        # question a has both options right, b one of two; over options: 2 true, 1 false positive, 0 false negative
        (
            "multirc",
            Answers([1, 0, 1, 1], [1, 0, 1, 0], groups=["a", "a", "b", "b"]),
            {"f1a": 2 * 2 / (2 * 2 + 1), "exact_match": 0.5},
        ),
        # "the Red Cross" is "red cross"; of "New York City" and "York" one word of three and of one is shared
        (
            "record",
            Answers(["the Red Cross", "New York City"], [["Red Cross", "Rome"], ["York"]]),
            {"f1": (1 + 2 * 1 / (3 + 1)) / 2, "exact_match": 0.5},
        ),
        (
            "language_modeling",
            Answers([(2.0, 1, 4), (4.0, 3, 4)], [None, None]),
            {"perplexity": math.exp(6 / 8), "loss": 6 / 8, "accuracy": 0.5},
        ),
    ],
)
def test_values(name: str, answers: Answers, expected: dict[str, float]) -> None:
    assert METRICS[name](answers) == pytest.approx(expected)
    assert METRICS[name].values == tuple(expected)  # the main one first


def test_every_metric_names_what_it_gives() -> None:
    for name, metric in METRICS.items():
        assert len(set(metric.values)) == len(metric.values) >= 1, name


def test_f1_knows_the_classes_that_nobody_names() -> None:
    three = np.full((2, 3), 1 / 3, dtype=np.float32)
    assert METRICS["f1"](Answers([1, 0], [1, 1])) == {"f1": pytest.approx(2 / 3)}
    assert METRICS["f1"](Answers([1, 0], [1, 1], probabilities=three)) == {"f1": pytest.approx(1 / 3)}  # macro


def test_renamed_values_stay_means() -> None:
    accuracy = rename_values(METRICS["accuracy"].compute, {"accuracy": "accuracy_norm"})
    assert isinstance(accuracy, MeanMetric)
    assert accuracy(BINARY) == {"accuracy_norm": pytest.approx(4 / 6)}
    assert accuracy.scores(BINARY)["accuracy_norm"].tolist() == [1, 0, 1, 0, 1, 1]
    assert rename_values(METRICS["matthews"].compute, {"accuracy": "x"})(BINARY) == METRICS["matthews"](BINARY)
