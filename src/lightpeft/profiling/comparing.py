"""Comparisons on a noisy machine: alternating measurements, medians and quartiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from lightpeft.errors import require

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample, in the unit of its values."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    n: int
    """Number of values."""


def summarize(values: Iterable[float]) -> Spread:
    """Compute median and quartiles (linear interpolation) of at least one value.

    Raises:
        LightPeftError: there are no values.
    """
    array = np.fromiter(values, dtype=float)
    require(array.size > 0, "no values to summarize; measure at least once")
    low, median, high = (float(value) for value in np.percentile(array, (25, 50, 75)))
    return Spread(median=median, low=low, high=high, n=array.size)


def alternate(subjects: Mapping[K, Callable[[], T]], rounds: int) -> dict[K, list[T]]:
    """Measure every subject once in each round, in turn.

    Returns:
        Name of the subject -> its measurements, one for each round.

    Raises:
        LightPeftError: there are no subjects, or `rounds` is below 1.
    """
    found = list(in_rounds(subjects, rounds))
    return {name: [values[name] for values in found] for name in subjects}


def in_rounds(subjects: Mapping[K, Callable[[], T]], rounds: int) -> Iterator[dict[K, T]]:
    """Measure every subject once in each round, and yield the measurements of a round by subject when it ends.

    Every other round goes backwards, so that a drift of the machine affects all subjects alike.

    Raises:
        LightPeftError: there are no subjects, or `rounds` is below 1.
    """
    require(subjects, "no subjects to measure; name at least one")
    require(rounds >= 1, f"rounds is {rounds}; give at least 1")
    for index in range(rounds):
        yield {name: subjects[name]() for name in list(subjects)[:: -1 if index % 2 else 1]}


def ratio(a: Sequence[float], b: Sequence[float]) -> Spread:
    """Compute median and quartiles of `a[i] / b[i]` over paired rounds, as `alternate` returns them.

    Raises:
        LightPeftError: the lengths differ, there are no values, or `b` contains a zero.
    """
    require(len(a) == len(b), f"{len(a)} and {len(b)} values cannot be paired; measure both in the same rounds")
    require(all(b), "the second series contains a 0, and a ratio to 0 is not defined; measure it again")
    return summarize(x / y for x, y in zip(a, b, strict=True))
