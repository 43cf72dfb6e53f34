"""`light: auto` as a pure search: from the measured cost of some cuts to the largest budget within a tolerance.

The final cost of a cut is not known before the end of training. Two quantities can be measured: the rise of the loss
right after the cut (`before`), and the part of it that is left after a cut copy and an uncut copy have both trained for
a few steps (a probe):

    left(b) = before(b) * r(b),    r = (rise after a probe) / (rise before it).

Between probed budgets r is interpolated linearly, and below them it is that of the nearest; no budget above the largest
probed one is returned. The rest of training is many times as long as a probe. It may recover more, so that a larger cut
would have been possible; but the uncut model may also learn what a smaller one cannot, so neither is assumed.

The first probed budget is the one that fits a typical r; the next is the largest one that is likely to be within the
tolerance by the probes so far. If that lies far below a budget that cost too much, the midpoint of the two is probed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from torch import Tensor

STEP, MOST = 0.05, 0.6
"""Budgets are multiples of `STEP`, at most `MOST`: a cut of 80% costs trained classifiers three points or more, and a
probe early in training does not always show that."""
CONFIDENCE = 0.8
"""Confidence that the cost stays below its upper bound."""
_BOUND_ERRORS = NormalDist().inv_cdf(CONFIDENCE)
"""Standard errors between the mean and that bound."""
_FIRST = 0.3
"""Assumed r before the first probe."""
_LEAST_LEFT = 0.1
"""Least r in the choice of the next probe."""
PROBES = 3
"""Largest number of probed budgets."""


@dataclass(frozen=True)
class Probed:
    """A probed budget; a rise is the loss of the cut copy minus that of the uncut one, in nats."""

    blocks: float
    """Budget as a part of the blocks."""
    before: float
    """Rise right after the cut."""
    after: float
    """Rise after both copies have trained for a few steps."""
    error: float
    """Standard error of `after`, paired by batch."""


@dataclass(frozen=True)
class Expected:
    """Expected cost of a budget."""

    blocks: float
    """Budget as a part of the blocks."""
    left: float
    """Rise of the loss that is left after training, in nats."""
    upper: float
    """Upper bound of `left` at `CONFIDENCE`, in nats."""


@dataclass
class BudgetSearch:
    """Search for the largest budget whose upper bound of the cost is within the tolerance."""

    before: Mapping[float, float]
    """Budget -> rise of the loss right after its cut, in nats; interpolated linearly between budgets."""
    tolerance: float
    """Largest cost, in nats."""
    gone: float = 0.0
    """Part of the blocks that was dropped before estimation; all budgets include it."""
    probed: list[Probed] = field(default_factory=list)
    """Probes so far, in the order of their budgets."""

    def run(self, probe: Callable[[float], Tensor], allows: Callable[[Sequence[float]], bool] | None = None) -> float:
        """Probe budgets, and return the largest one within the tolerance; 0 if there is none.

        Args:
            probe: returns, for a budget, the losses of held-out batches after a few steps of training minus those of
                an uncut copy that trained equally long: [batches], in nats.
            allows: returns True if these budgets may all be probed; it is not asked about the first. None: no limit.
        """
        while (tried := self._next()) is not None:
            if allows is not None and self.probed and not allows([*(each.blocks for each in self.probed), tried]):
                break
            self._add_probe(tried, probe(tried))
        return self.found

    @property
    def found(self) -> float:
        """Largest budget within the tolerance by the probes so far, and not above the largest probed one; 0: none."""
        highest = max(each.blocks for each in self.probed)
        return self._largest(lambda blocks: self.expected(blocks).upper, highest) or 0.0

    def expected(self, blocks: float) -> Expected:
        """Return the expected cost of a budget by the probes so far."""
        return self._cost(blocks, _interpolate(self._recovery, blocks))

    @property
    def grid(self) -> list[float]:
        """Budgets to choose from: multiples of `STEP` above `gone`, up to `MOST`."""
        highest = max(self.before)
        parts = [round(STEP * count, 2) for count in range(1, int(highest / STEP + 1e-9) + 1)]
        left = [part for part in parts if part > self.gone] or [highest]
        return [part for part in left if part <= MOST] or left[:1]

    def rise(self, blocks: float) -> float:
        """Return the rise of the loss right after a cut of this budget, in nats, at least 1e-6.

        On few rows a cut may seem to cost nothing. If a probe shows a cost, that is a lower bound for the rise, in
        proportion also below the probed budget.
        """
        before = {self.gone: 0.0, **self.before}
        points = {part: _interpolate(before, part) for part in {*before, *(each.blocks for each in self.probed)}}
        for each in self.probed:
            slope = each.after / (each.blocks - self.gone)
            points |= {
                part: max(rise, slope * (part - self.gone)) for part, rise in points.items() if part <= each.blocks
            }
        return max(_interpolate(points, blocks), 1e-6)

    @property
    def _recovery(self) -> dict[float, float]:
        """Probed budget -> part of the rise that is left after training: r, in [0, 1]."""
        return {each.blocks: min(1.0, max(0.0, each.after) / self.rise(each.blocks)) for each in self.probed}

    def _next(self) -> float | None:
        """Return the budget to probe next; None: the search is over."""
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
        """Return the expected cost of a budget, also far from all probes: r grows in proportion to the budget."""
        if not self.probed:
            return self._cost(blocks, _FIRST)
        seen = {part: max(recovery, _LEAST_LEFT) for part, recovery in self._recovery.items()}
        highest = max(seen)
        at_all = seen[highest] * (1 - self.gone) / (highest - self.gone)
        return self._cost(blocks, _interpolate({self.gone: 0.0, **seen, 1.0: at_all}, blocks))

    def _cost(self, blocks: float, recovery: float) -> Expected:
        """Return the expected cost of a budget, given the part `recovery` of its rise that is left after training."""
        rise = self.rise(blocks)
        spreads = {each.blocks: each.error / self.rise(each.blocks) for each in self.probed}
        error = rise * _interpolate(spreads, blocks) if spreads else 0.0
        return Expected(blocks, rise * recovery, min(rise, rise * recovery + _BOUND_ERRORS * error))

    def _add_probe(self, blocks: float, rises: Tensor) -> None:
        after, error = float(rises.mean()), float(rises.std()) / math.sqrt(len(rises))
        probed = Probed(blocks, max(self.rise(blocks), after), after, error)
        self.probed = sorted([*self.probed, probed], key=lambda each: each.blocks)

    def _largest(self, cost: Callable[[float], float], highest: float = 1.0) -> float | None:
        """Return the largest budget such that it and all smaller ones cost no more than the tolerance; None: none."""
        within = None
        for blocks in self.grid:
            if blocks > highest + 1e-9 or cost(blocks) > self.tolerance:
                break
            within = blocks
        return within


def _interpolate(points: Mapping[float, float], place: float) -> float:
    """Interpolate linearly between points (x -> y); beyond the outermost points, return the nearest one's value."""
    return float(np.interp(place, sorted(points), [points[x] for x in sorted(points)]))
