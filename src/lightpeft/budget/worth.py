"""Conversion of nats of the loss into points of a metric, for classifiers.

For a calibrated classifier that errs with probability e among C classes, the derivative of the cross-entropy with
respect to e is ln((1 - e) (C - 1) / e), that of its entropy if every row is alike. The loss of the metric when errors
become more frequent, each kind in proportion, is computed on the predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

_MORE = 0.01
"""Additional errors, as a part of all predictions."""
_LEAST_NATS = 1.0
"""Least nats per error: near chance, where the entropy is flat, a nat would be worth any number of points."""


def accuracy_of_counts(counts: np.ndarray) -> float:
    """Return the accuracy of a confusion matrix, [right class, predicted class]."""
    return float(np.trace(counts) / counts.sum())


def points_per_nat(
    right: np.ndarray, answered: np.ndarray, classes: int, metric: Callable[[np.ndarray], float] = accuracy_of_counts
) -> float:
    """Return the points (hundredths) of a metric per nat of the loss, for small rises of the loss.

    The result is never less than that of accuracy.

    Args:
        right, answered: class numbers of labels and predictions, [rows].
        classes: number of classes.
        metric: computes the metric from a confusion matrix, counts [right class, predicted class].
    """
    counts = np.zeros((classes, classes))
    np.add.at(counts, (right, answered), 1)
    correct, total = np.trace(counts), counts.sum()
    errors = counts - np.diag(np.diag(counts))
    if not errors.any():  # all kinds alike
        errors = 1.0 - np.eye(classes)
    error = max((total - correct) / total, 0.5 / total)
    more = _MORE * total
    fewer = 1 - more / max(correct, more)
    worse = np.diag(np.diag(counts)) * fewer + errors / errors.sum() * (total - correct + more)
    nats = _MORE * max(_LEAST_NATS, math.log((1 - error) * (classes - 1) / error) if error < 1 else 0.0)
    # a metric that is 0 for answers that are all the same still has much to lose
    lost = max(_MORE, metric(counts) - metric(worse))
    return 100 * lost / nats
