"""From what some cuts cost to the largest one that a tolerance bears: `light: auto`, as a pure search.

What a cut costs in the end is not known before the end. What is known: how much the loss rises when it is made
(`before`), and how much of that is left when a copy has trained for a few steps beside a copy that was not cut (a
probe):

    left(b) = before(b) * r(b),    r = (rise after a probe) / (rise before it).

Between budgets that were probed r lies on a line, and below them it is that of the nearest; more than the largest of
them is never found. The rest of training is many times as long. It may win back more, and then more could have been
cut; but a whole model may learn what a small one cannot, so that nothing of it is counted on.

The first budget to be probed is one that would be right if r were what it often is; the next the largest one that is
likely to be within the tolerance by what was seen. Where that lies far below one that was too much, it is half way
between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from torch import Tensor

STEP, MOST = 0.05, 0.6
"""Budgets are multiples of the first, and no more than the second is found: 80% cost classifiers that had learned their
task three points or more, and a probe, made when a model has hardly begun to, does not always see that."""
CONFIDENCE = 0.8
"""That what is lost stays below its upper bound."""
_SIDE = NormalDist().inv_cdf(CONFIDENCE)
"""Standard errors from the mean to that bound."""
_FIRST = 0.3
"""r before anything was probed."""
_LEAST_LEFT = 0.1
"""r at least, of a budget that says where to probe next."""
PROBES = 3
"""Budgets that are probed at most."""


@dataclass(frozen=True)
class Probed:
    """A budget that was probed; numbers are rises of the loss against nothing cut, in nats."""

    blocks: float
    before: float
    """Where nothing has trained since the cut."""
    after: float
    """When both have trained for a few steps."""
    error: float
    """Standard error of that, paired by batch."""


@dataclass(frozen=True)
class Expected:
    """What a budget is expected to cost."""

    blocks: float
    left: float
    """Rise of the loss, in nats."""
    upper: float
    """Its upper bound, at `CONFIDENCE`."""


@dataclass
class BudgetSearch:
    """The largest budget whose upper bound is within the tolerance."""

    before: Mapping[float, float]
    """Budget -> rise of the loss when it is cut, at some budgets; a line between them."""
    tolerance: float
    """Nats."""
    gone: float = 0.0
    """What is gone already, in front of all budgets."""
    probed: list[Probed] = field(default_factory=list)

    def run(self, probe: Callable[[float], Tensor], allows: Callable[[Sequence[float]], bool] | None = None) -> float:
        """Probe some budgets, and give the one that was found; 0 where none is within the tolerance.

        Args:
            probe: budget -> by how much the losses of some batches are higher than with nothing cut, after a few steps
                of training of both: [batches].
            allows: whether so many budgets may be probed, of which the first always may; None: all may.
        """
        while (tried := self._next()) is not None:
            if allows is not None and self.probed and not allows([*(each.blocks for each in self.probed), tried]):
                break
            self._take(tried, probe(tried))
        return self.found

    @property
    def found(self) -> float:
        """The largest budget within the tolerance by what was probed so far, and not above what was probed."""
        highest = max(each.blocks for each in self.probed)
        return self._largest(lambda blocks: self.expected(blocks).upper, highest) or 0.0

    def expected(self, blocks: float) -> Expected:
        """What a budget costs, by what was probed so far."""
        return self._cost(blocks, _on_line(self._recovery, blocks))

    @property
    def grid(self) -> list[float]:
        """Budgets that can be found."""
        highest = max(self.before)
        parts = [round(STEP * count, 2) for count in range(1, int(highest / STEP + 1e-9) + 1)]
        left = [part for part in parts if part > self.gone] or [highest]
        return [part for part in left if part <= MOST] or left[:1]

    def rise(self, blocks: float) -> float:
        """Of the loss when so much is cut and nothing has trained.

        Few rows may say that a cut costs nothing; where copies that have trained say otherwise, so does all below.
        """
        before = {self.gone: 0.0, **self.before}
        points = {part: _on_line(before, part) for part in {*before, *(each.blocks for each in self.probed)}}
        for each in self.probed:
            slope = each.after / (each.blocks - self.gone)
            points |= {
                part: max(rise, slope * (part - self.gone)) for part, rise in points.items() if part <= each.blocks
            }
        return max(_on_line(points, blocks), 1e-6)

    @property
    def _recovery(self) -> dict[float, float]:
        """Budget -> part of the rise that is left after its probe: r, in [0, 1]."""
        return {each.blocks: min(1.0, max(0.0, each.after) / self.rise(each.blocks)) for each in self.probed}

    def _next(self) -> float | None:
        """The budget to probe next; None: enough is known."""
        tried = [each.blocks for each in self.probed]
        likely = self._largest(lambda blocks: self._likely(blocks).upper)
        if not tried:
            return likely or self.grid[0]
        if len(tried) == PROBES:
            return None
        if likely is None:
            return None if self.grid[0] in tried else self.grid[0]
        if not min(tried) <= likely <= max(tried):
            return likely
        above = min((blocks for blocks in tried if blocks > likely), default=likely)
        middle = round(likely + STEP * int((above - likely) / STEP / 2 + 1e-9), 2)
        return middle if middle > likely else None

    def _likely(self, blocks: float) -> Expected:
        """What a budget costs, also where nothing was probed beside it: r grows as the budget does."""
        if not self.probed:
            return self._cost(blocks, _FIRST)
        seen = {part: max(recovery, _LEAST_LEFT) for part, recovery in self._recovery.items()}
        highest = max(seen)
        at_all = seen[highest] * (1 - self.gone) / (highest - self.gone)
        return self._cost(blocks, _on_line({self.gone: 0.0, **seen, 1.0: at_all}, blocks))

    def _cost(self, blocks: float, recovery: float) -> Expected:
        """The cost of a budget of whose rise this part is left."""
        rise = self.rise(blocks)
        spreads = {each.blocks: each.error / self.rise(each.blocks) for each in self.probed}
        error = rise * _on_line(spreads, blocks) if spreads else 0.0
        return Expected(blocks, rise * recovery, min(rise, rise * recovery + _SIDE * error))

    def _take(self, blocks: float, rises: Tensor) -> None:
        after, error = float(rises.mean()), float(rises.std()) / math.sqrt(len(rises))
        probed = Probed(blocks, max(self.rise(blocks), after), after, error)
        self.probed = sorted([*self.probed, probed], key=lambda each: each.blocks)

    def _largest(self, cost: Callable[[float], float], highest: float = 1.0) -> float | None:
        """The largest budget of which it and all below cost no more than the tolerance."""
        within = None
        for blocks in self.grid:
            if blocks > highest + 1e-9 or cost(blocks) > self.tolerance:
                break
            within = blocks
        return within


def _on_line(points: Mapping[float, float], place: float) -> float:
    """Between two points on the line through them; beside all of them, as at the nearest."""
    return float(np.interp(place, sorted(points), [points[x] for x in sorted(points)]))
