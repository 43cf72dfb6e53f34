"""What a nat of the loss is worth in points of a metric, where a head answers with classes.

Of a classifier that knows how sure it is and errs with probability e among C classes, the cross-entropy rises with e by
ln((1 - e) (C - 1) / e): the derivative of its entropy, if every row is alike. What the metric loses when errors become
more frequent, each kind in proportion, is counted on the answers themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

_MORE = 0.01
"""Errors more, as a part of all answers."""
_LEAST_NATS = 1.0
"""Of an error: next to chance, where the entropy is flat, a nat would be worth any number of points."""


def accuracy_of_counts(counts: np.ndarray) -> float:
    """Accuracy of a confusion matrix."""
    return float(np.trace(counts) / counts.sum())


def points_a_nat(
    right: np.ndarray, answered: np.ndarray, classes: int, metric: Callable[[np.ndarray], float] = accuracy_of_counts
) -> float:
    """By how many hundredths of a metric a model gets worse when its loss rises by a nat, for small rises.

    At least as many as of accuracy.

    Args:
        right, answered: class numbers of some rows, [rows].
        classes: how many there are.
        metric: of a confusion matrix, counts [right class, answered class].
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
