"""Intervals and paired tests against hand-made cases, scipy, and their own promise: coverage on synthetic data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from lanes import thorough
from scipy.stats import binom, bootstrap, pearsonr
from sklearn.metrics import f1_score, matthews_corrcoef

from lightpeft.app.evaluation.statistics import Comparison, bootstrap_intervals, compare
from lightpeft.app.tasks.answers import Answers, ClassMetric, MeanMetric
from lightpeft.app.tasks.metrics import METRICS
from lightpeft.errors import LightPeftError


def right(answers: Answers) -> dict[str, np.ndarray]:
    return {"accuracy": np.asarray(answers.predictions) == np.asarray(answers.references)}


def f1(answers: Answers) -> dict[str, float]:
    predicted, true = np.asarray(answers.predictions), np.asarray(answers.references)
    return {"f1": 2 * float(predicted @ true) / float(predicted.sum() + true.sum())}


def pearson(answers: Answers) -> dict[str, float]:
    return {"pearson": float(pearsonr(answers.predictions, answers.references)[0])}


def group_exact_match(answers: Answers) -> dict[str, float]:
    """Part of the groups with every example right."""
    assert answers.groups is not None
    whole: dict[Any, bool] = {}
    for group, *pair in zip(answers.groups, answers.predictions, answers.references, strict=True):
        whole[group] = whole.get(group, True) and pair[0] == pair[1]
    return {"exact": float(np.mean(list(whole.values())))}


accuracy = MeanMetric(right)


def answers_of(correct: Sequence[int] | np.ndarray, groups: Sequence[Any] | None = None) -> Answers:
    """Answers to so many two-class examples, right where `correct` is 1."""
    references = [index % 2 for index in range(len(correct))]
    predictions = [ref if hit else 1 - ref for ref, hit in zip(references, correct, strict=True)]
    return Answers(predictions, references, groups)


def noisy(count: int, error: float, seed: int = 0) -> Answers:
    return answers_of(np.random.default_rng(seed).random(count) >= error)


class TestIntervals:
    def test_equals_scipy(self) -> None:
        answers = noisy(60, 0.3)
        expected = bootstrap((right(answers)["accuracy"],), np.mean, n_resamples=999, method="percentile", rng=0)
        low, high = bootstrap_intervals(answers, accuracy, resamples=999)["accuracy"] or (0, 0)
        assert low == pytest.approx(expected.confidence_interval.low)
        assert high == pytest.approx(expected.confidence_interval.high)

    def test_of_a_mean_is_binomial(self) -> None:
        answers = answers_of([1] * 80 + [0] * 20)
        low, high = bootstrap_intervals(answers, accuracy, resamples=20_000)["accuracy"] or (0, 0)
        assert (low, high) == pytest.approx((binom.ppf(0.025, 100, 0.8) / 100, binom.ppf(0.975, 100, 0.8) / 100))
        narrow = bootstrap_intervals(answers, accuracy, resamples=20_000, level=0.5)["accuracy"]
        assert narrow == pytest.approx((binom.ppf(0.25, 100, 0.8) / 100, binom.ppf(0.75, 100, 0.8) / 100))

    def test_a_mean_and_any_other_function_see_the_same_resamples(self) -> None:
        answers = noisy(50, 0.3)
        assert bootstrap_intervals(answers, accuracy) == bootstrap_intervals(answers, lambda a: accuracy(a))

    @pytest.mark.parametrize("classes", [2, 4])
    def test_counts_give_what_answers_give(self, classes: int) -> None:
        """Metrics of classes from confusion matrices equal scikit-learn's, also where a resample lacks a class."""
        draw = np.random.default_rng(classes)
        references = draw.choice(classes, 25, p=[0.9, *[0.1 / (classes - 1)] * (classes - 1)])
        predictions = np.where(draw.random(25) < 0.7, references, draw.integers(0, classes, 25))
        answers = Answers(predictions.tolist(), references.tolist(), probabilities=np.zeros((25, classes)))
        f1 = partial(f1_score, zero_division=0)
        theirs = {
            "f1": partial(f1, average="binary" if classes == 2 else "macro"),
            "f1_macro": partial(f1, average="macro"),
            "matthews": matthews_corrcoef,
        }
        for name, of in theirs.items():
            metric = METRICS[name].compute
            assert isinstance(metric, ClassMetric)
            slow = bootstrap_intervals(
                answers, lambda a, of=of, name=name: {name: of(a.references, a.predictions)}, resamples=100
            )
            assert bootstrap_intervals(answers, metric, resamples=100)[name] == pytest.approx(slow[name])
            assert metric(answers)[name] == of(answers.references, answers.predictions), "to the last bit"

    @thorough
    def test_coverage(self) -> None:
        """Of 400 samples of 100 examples, about 95% of the intervals hold the true accuracy."""
        held = 0
        for seed in range(400):
            low, high = bootstrap_intervals(noisy(100, 0.3, seed), accuracy, resamples=200, seed=seed)["accuracy"] or (
                2,
                2,
            )
            held += low <= 0.7 <= high
        assert 0.91 <= held / 400 <= 0.98  # four standard errors of a binomial around the 94.5% known for n = 100

    @thorough
    def test_coverage_of_groups(self) -> None:
        """Groups of five equal examples: intervals over groups keep their promise, those over examples don't."""
        held = {True: 0, False: 0}
        for seed in range(200):
            correct = np.repeat(np.random.default_rng(seed).random(40) >= 0.3, 5)
            for grouped in held:
                groups = [index // 5 for index in range(200)] if grouped else None
                answers = answers_of(correct, groups)
                low, high = bootstrap_intervals(answers, accuracy, resamples=200, seed=seed)["accuracy"] or (2, 2)
                held[grouped] += low <= 0.7 <= high
        assert held[True] / 200 >= 0.88
        assert held[False] / 200 <= 0.75

    def test_a_group_that_is_drawn_twice_counts_twice(self) -> None:
        """Two groups, one right: a resample has 0, 1 or 2 right groups, so an exact match of 0, a half or 1."""
        answers = answers_of([1, 1, 1, 0], ["a", "a", "b", "b"])
        assert group_exact_match(answers) == {"exact": 0.5}
        seen = set()

        def spy(resample: Answers) -> dict[str, float]:
            assert resample.groups is not None
            assert len(set(resample.groups)) == 2
            seen.add(group_exact_match(resample)["exact"])
            return group_exact_match(resample)

        assert bootstrap_intervals(answers, spy, resamples=50)["exact"] == (0.0, 1.0)
        assert seen == {0.0, 0.5, 1.0}

    @pytest.mark.parametrize(
        ("answers", "metric"),
        [
            (answers_of([1]), accuracy),
            (answers_of([1, 0, 1], ["a", "a", "a"]), accuracy),
            (Answers([2.0] * 20, list(np.arange(20.0))), pearson),
        ],
        ids=["one example", "one group", "undefined"],
    )
    @pytest.mark.filterwarnings("ignore:An input array is constant")
    def test_none_where_there_is_none(self, answers: Answers, metric: Any) -> None:
        assert list(bootstrap_intervals(answers, metric).values()) == [None]
        (comparison,) = compare(answers, answers, metric).values()
        assert comparison.interval is None

    def test_undefined_resamples_are_left_out(self) -> None:
        """A correlation of three numbers is undefined in the ninth of the resamples that draw one number only."""
        low, high = bootstrap_intervals(Answers([1.0, 2.0, 4.0], [1.0, 3.0, 2.0]), pearson)["pearson"] or (0, 0)
        assert -1 <= low < high <= 1.0000001


class TestComparison:
    def test_mcnemar_by_hand(self) -> None:
        """Ten examples apart, nine of them for the second: p = 2 (1 + 10) / 2**10."""
        first = answers_of([1] * 20 + [1] + [0] * 9)
        second = answers_of([1] * 20 + [0] + [1] * 9)
        result = compare(first, second, accuracy)["accuracy"]
        assert result.test == "McNemar"
        assert result.p_value == pytest.approx(22 / 1024)
        assert (result.first, result.second) == pytest.approx((21 / 30, 29 / 30))
        assert result.difference == pytest.approx(8 / 30)
        assert result.interval is not None
        assert 0 < result.interval[0] < 8 / 30 < result.interval[1] < 0.5

    def test_the_same_model(self) -> None:
        answers = noisy(40, 0.3)
        for metric, name, test in ((accuracy, "accuracy", "McNemar"), (f1, "f1", "paired bootstrap")):
            value = metric(answers)[name]
            assert compare(answers, answers, metric)[name] == Comparison(value, value, 0.0, (0.0, 0.0), 1.0, test)

    def test_the_other_way_round(self) -> None:
        first, second = noisy(200, 0.3, 1), noisy(200, 0.2, 2)
        for metric, name in ((accuracy, "accuracy"), (f1, "f1")):
            forth, back = compare(first, second, metric)[name], compare(second, first, metric)[name]
            assert forth.difference == -back.difference
            assert forth.p_value == pytest.approx(back.p_value)
            assert forth.interval == pytest.approx(tuple(-end for end in reversed(back.interval or ())))

    def test_paired_bootstrap_agrees_with_its_interval(self) -> None:
        """p is below 0.05 where the 95% interval lies on one side of zero."""
        for seed in range(20):
            result = compare(noisy(100, 0.3, seed), noisy(100, 0.2, seed + 50), f1, resamples=200)["f1"]
            assert result.p_value is not None and result.interval is not None
            low, high = result.interval
            if abs(result.p_value - 0.05) > 0.02:  # quantiles lie between resamples
                assert (result.p_value < 0.05) == (low > 0 or high < 0)

    @thorough
    def test_false_alarms(self) -> None:
        """Of 200 pairs of equally good models about one in twenty is called different, by either test."""
        alarms = {"accuracy": 0, "f1": 0}
        for seed in range(200):
            first, second = noisy(100, 0.3, 2 * seed), noisy(100, 0.3, 2 * seed + 1)
            alarms["accuracy"] += (compare(first, second, accuracy, resamples=2)["accuracy"].p_value or 0) < 0.05
            other = MeanMetric(lambda a: {"f1": right(a)["accuracy"] * 0.5})  # no zeros and ones: the bootstrap
            alarms["f1"] += (compare(first, second, other, resamples=200)["f1"].p_value or 0) < 0.05
        assert alarms["accuracy"] <= 18  # the exact test is conservative
        assert 1 <= alarms["f1"] <= 22

    def test_groups_are_not_for_mcnemar(self) -> None:
        groups = [index // 2 for index in range(20)]
        result = compare(answers_of([1, 0] * 10, groups), answers_of([1] * 20, groups), accuracy)["accuracy"]
        assert result.test == "paired bootstrap"
        assert result.p_value == pytest.approx(2 / 1001)

    @pytest.mark.parametrize("other", [answers_of([1, 0]), Answers([0, 1, 0], [0, 0, 0])], ids=["fewer", "others"])
    def test_other_examples_are_refused(self, other: Answers) -> None:
        with pytest.raises(LightPeftError, match="same examples"):
            compare(answers_of([1, 0, 1]), other, accuracy)
