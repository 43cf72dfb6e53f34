"""Bootstrap confidence intervals of metrics, and paired tests of two models on the same examples.

Everything is computed from `Answers`; no model is run. One seed determines all draws, so that every metric and both
models of a comparison have the same resamples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any, Literal

import numpy as np
from scipy.stats import binomtest

from lightpeft.app.tasks.answers import Answers, ClassMetric, MeanMetric, Metric, class_count
from lightpeft.errors import require

RESAMPLES = 1000
"""Resamples of a bootstrap."""
LEVEL = 0.95
"""Confidence of an interval."""

Interval = tuple[float, float]
"""Lower and upper end."""
Test = Literal["McNemar", "paired bootstrap"]


@dataclass(frozen=True)
class Comparison:
    """One metric of two models on the same examples."""

    first: float
    """Value of the first model, on all examples."""
    second: float
    """Value of the second model, on all examples."""
    difference: float
    """`second - first`."""
    interval: Interval | None
    """Percentile bootstrap interval of the difference; None if undefined (see `bootstrap_intervals`)."""
    p_value: float | None
    """Two-sided p value of no difference between the models."""
    test: Test
    """Test that gives the p value."""


def bootstrap_intervals(
    answers: Answers, *metrics: Metric, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> dict[str, Interval | None]:
    """Return percentile bootstrap confidence intervals of metrics (Efron and Tibshirani 1993, chapter 13).

    Examples are drawn with replacement; if `answers.groups` is set, whole groups are, because examples of a group are
    not independent.

    Args:
        answers: answers of one model.
        metrics: computed on every resample; fast for a `MeanMetric` or a `ClassMetric`.
        resamples: number of resamples.
        level: confidence level, in (0, 1).
        seed: seed of the draws.

    Returns:
        Name of every value of `metrics` -> its interval; None with fewer than two examples (groups), or if half of the
        resampled values or more are not finite. Otherwise values that are not finite are left out.
    """
    values = (_resample([answers], metric, resamples, seed)[0] for metric in metrics)
    return {name: percentile_interval(of_name, level) for of_metric in values for name, of_name in of_metric.items()}


def compare(
    first: Answers, second: Answers, *metrics: Metric, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Comparison]:
    """Test if two models differ in metrics, on the same examples.

    For a `MeanMetric` of zeros and ones without groups, the p value is that of McNemar's exact test: by chance, each
    model has half of the examples that only one of them got right (McNemar 1947). Otherwise it is that of the paired
    bootstrap: twice the share of resampled differences on the other side of zero, with the observed sample counted in
    (Davison and Hinkley 1997, section 4.4). The interval is always a percentile interval of resampled differences.

    Args:
        first: answers of one model.
        second: answers of the other model, to the same examples in the same order.
        metrics: metrics to compare.
        resamples: number of resamples.
        seed: seed of the draws.

    Returns:
        Name of every value of `metrics` -> its comparison.

    Raises:
        LightPeftError: the answers are not to the same examples.
    """
    same = len(first) == len(second) and all(map(_equal, first.references, second.references))
    require(same, "the references of the two models differ; compare models on the same examples")
    comparisons: dict[str, Comparison] = {}
    for metric in metrics:
        comparisons |= _compare_metric(first, second, metric, _resample([first, second], metric, resamples, seed))
    return comparisons


def compare_as_data(first: Answers, second: Answers, *metrics: Metric) -> dict[str, dict[str, Any]]:
    """Return what `compare` finds as plain data, for JSON: name of every value -> fields of `Comparison`."""
    return {name: asdict(found) for name, found in compare(first, second, *metrics).items()}


def _compare_metric(
    first: Answers, second: Answers, metric: Metric, values: list[dict[str, np.ndarray]]
) -> dict[str, Comparison]:
    """Return the comparisons of one metric; `values` holds its resampled values for both models."""
    before, after, exact = metric(first), metric(second), _mcnemar(first, second, metric)
    comparisons = {}
    for name in before:
        differences = values[1][name] - values[0][name]
        test: Test = "McNemar" if name in exact else "paired bootstrap"
        comparisons[name] = Comparison(
            before[name],
            after[name],
            after[name] - before[name],
            percentile_interval(differences, LEVEL),
            exact[name] if name in exact else _bootstrap_p(differences),
            test,
        )
    return comparisons


def _equal(one: Any, other: Any) -> bool:
    return bool(np.array_equal(one, other))


# -- resampling --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draw:
    """One resample."""

    indices: np.ndarray
    """Indices of the drawn examples, int64; some occur twice, others not at all."""
    groups: np.ndarray | None
    """Group of each drawn example, or None without groups; a group drawn twice counts as two groups."""


def _draws(answers: Answers, count: int, seed: int) -> Iterator[_Draw]:
    generator = np.random.default_rng(seed)
    if answers.groups is None:
        for _ in range(count):
            yield _Draw(generator.integers(0, len(answers), len(answers)), None)
        return
    members = _members(answers.groups)
    sizes = np.array([len(indices) for indices in members])
    numbers = np.arange(len(members))
    for _ in range(count):
        drawn = generator.integers(0, len(members), len(members))
        yield _Draw(np.concatenate([members[group] for group in drawn]), np.repeat(numbers, sizes[drawn]))


def _members(groups: Sequence[Any]) -> list[np.ndarray]:
    """Return the indices of the examples of every group; groups are in the order of their first example."""
    found: dict[Any, list[int]] = {}
    for index, group in enumerate(groups):
        found.setdefault(group, []).append(index)
    return [np.array(indices) for indices in found.values()]


def _resample(models: list[Answers], metric: Metric, count: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Return, per model, name -> resampled values, float64 [count]; all NaN with fewer than two examples or groups."""
    units = len(models[0]) if models[0].groups is None else len(set(models[0].groups))
    if units < 2:
        return [dict.fromkeys(metric(answers), np.full(count, np.nan)) for answers in models]
    statistics = [_statistic(answers, metric) for answers in models]
    values: list[list[dict[str, float]]] = [[] for _ in models]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # metrics warn about resamples with a single class
        for draw in _draws(models[0], count, seed):
            for collected, statistic in zip(values, statistics, strict=True):
                collected.append(statistic(draw))
    names = list(metric(models[0]))  # a resample may lack the examples of a value
    return [
        {name: np.array([value.get(name, np.nan) for value in collected]) for name in names} for collected in values
    ]


def _statistic(answers: Answers, metric: Metric) -> Callable[[_Draw], dict[str, float]]:
    """Return the metric as a function of a resample."""
    if isinstance(metric, MeanMetric):
        scores = metric.scores(answers)
        return lambda draw: {name: values[draw.indices].mean() for name, values in scores.items()}
    if isinstance(metric, ClassMetric):
        return _count_statistic(answers, metric)
    arrays = replace(answers, predictions=_as_array(answers.predictions), references=_as_array(answers.references))
    return lambda draw: metric(replace(arrays.take(draw.indices), groups=draw.groups))  # type: ignore[arg-type]


def _count_statistic(answers: Answers, metric: ClassMetric) -> Callable[[_Draw], dict[str, float]]:
    """Return a class metric as a function of a resample, by the resample's confusion matrix."""
    classes = class_count(answers)
    cells = np.asarray(answers.references) * classes + np.asarray(answers.predictions)

    def of(draw: _Draw) -> dict[str, float]:
        counts = np.bincount(cells[draw.indices], minlength=classes**2)
        return metric.of_counts(counts.reshape(classes, classes))

    return of


def _as_array(values: Sequence[Any]) -> Sequence[Any]:
    """Return numbers, or tuples of numbers, as an array, which is fast to index; other values unchanged."""
    flat = [number for value in values for number in (value if isinstance(value, tuple) else (value,))]
    return np.asarray(values) if all(isinstance(number, Real) for number in flat) else values  # type: ignore[return-value]


# -- tests -------------------------------------------------------------------------------------------------------


def percentile_interval(values: np.ndarray, level: float) -> Interval | None:
    """Return the central interval of resampled values, float [resamples]; None unless more than half are finite."""
    defined = values[np.isfinite(values)]
    if 2 * len(defined) <= len(values):
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _mcnemar(first: Answers, second: Answers, metric: Metric) -> dict[str, float]:
    """Return the p values of McNemar's exact test, for values to which it applies."""
    if not isinstance(metric, MeanMetric) or first.groups is not None:
        return {}
    before, after = metric.scores(first), metric.scores(second)
    binary = [name for name in before if np.isin([before[name], after[name]], (0, 1)).all()]
    return {name: _mcnemar_p(before[name] > after[name], after[name] > before[name]) for name in binary}


def _mcnemar_p(first_only: np.ndarray, second_only: np.ndarray) -> float:
    one, other = int(first_only.sum()), int(second_only.sum())
    return float(binomtest(one, one + other).pvalue) if one + other else 1.0


def _bootstrap_p(differences: np.ndarray) -> float | None:
    defined = differences[np.isfinite(differences)]
    if 2 * len(defined) <= len(differences):
        return None
    beyond = min((defined <= 0).sum(), (defined >= 0).sum())
    return float(min(1.0, 2 * (beyond + 1) / (len(defined) + 1)))
