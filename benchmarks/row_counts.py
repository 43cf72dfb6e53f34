"""Right answers of a model as counts, row by row: their sums give the metric, so models are compared on equal rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

RESAMPLES = 2000
Counts = np.ndarray
"""Float [rows, counts]."""


def right(logits: Tensor, labels: Tensor) -> Counts:
    """[right, 1] a row."""
    found = (logits.argmax(-1) == labels).double()
    return np.stack([found.numpy(), np.ones(len(found))], -1)


def confusion(logits: Tensor, labels: Tensor) -> Counts:
    """Of two classes: one of four cells, by right and answered class."""
    return np.eye(4)[(2 * labels + logits.argmax(-1)).numpy()]


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Entities of BIO tags: kind, first word, word behind the last. An I of another kind begins one (conlleval)."""
    found, kind, begun = set(), "", 0
    for place, tag in enumerate([*tags, "O"]):
        mark, _, its_kind = tag.partition("-")
        if kind and (mark != "I" or its_kind != kind):
            found.add((kind, begun, place))
            kind = ""
        if mark != "O" and not kind:
            kind, begun = its_kind, place
    return found


def entities(names: Sequence[str], logits: Tensor, labels: Tensor) -> Counts:
    """[found and right, found, there] a row, of the words that have a label (not -100)."""
    rows = []
    for answer, truth in zip(logits.argmax(-1), labels, strict=True):
        made, there = (spans([names[tag] for tag in tags[truth != -100].tolist()]) for tags in (answer, truth))
        rows.append([len(made & there), len(made), len(there)])
    return np.array(rows, float)


def _matthews(sums: np.ndarray) -> np.ndarray:
    tn, fp, fn, tp = np.moveaxis(sums, -1, 0)
    spread = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / np.sqrt(np.where(spread > 0, spread, np.inf))


VALUES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "accuracy": lambda sums: sums[..., 0] / sums[..., 1],
    "matthews": _matthews,
    "entity_f1": lambda sums: 2 * sums[..., 0] / np.maximum(sums[..., 1] + sums[..., 2], 1),
}
"""Metric -> its value of summed counts, [..., counts] -> [...]."""


def value(metric: str, counts: Any) -> float:
    """The metric of all rows."""
    return float(VALUES[metric](np.asarray(counts).sum(0)))


@dataclass(frozen=True)
class Difference:
    """Second minus first, mean over the seeds that both have; its 95% interval and two-sided p over resampled rows."""

    mean: float
    low: float
    high: float
    p: float
    seeds: int


def paired(metric: str, first: Mapping[int, Any], second: Mapping[int, Any]) -> Difference | None:
    """Bootstrap over the test rows of counts by seed, with the same draws for all; None without a common seed."""
    shared = [seed for seed in first if seed in second]
    if not shared:
        return None
    rows = len(first[shared[0]])
    draws = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), RESAMPLES)
    weights = np.vstack([np.ones(rows), draws])
    of = [[VALUES[metric](weights @ np.asarray(counts[seed])) for seed in shared] for counts in (first, second)]
    observed, *drawn = np.mean(of[1], axis=0) - np.mean(of[0], axis=0)
    beyond = min(np.sum(np.array(drawn) <= 0), np.sum(np.array(drawn) >= 0))
    low, high = np.quantile(drawn, [0.025, 0.975])
    p = min(1.0, 2 * (beyond + 1) / (RESAMPLES + 1))
    return Difference(float(observed), float(low), float(high), float(p), len(shared))
