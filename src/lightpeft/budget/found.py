"""The budget that a search found, or a fixed one in its place: its expected cost, in words too."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightpeft.budget.search import CONFIDENCE, Expected, Probed
from lightpeft.prune.learning import LEAST_LEARNED

SHORT = 0.4
"""Fixed budget, as a part of the blocks, for a classifier whose run is too short for a search, as measured on files of
300 to 1,000 rows (docs/explanation/results.md)."""


def has_learned(part: float) -> bool:
    """Return True if a model has learned enough to measure the cost of a cut.

    Args:
        part: decrease of its loss relative to that of the label frequencies, as a part of the latter.
    """
    return part >= LEAST_LEARNED


def fixed_budget(classes: bool, gone: float = 0.0) -> float:
    """Return the budget, as a part of the blocks, where the settings give none and a search is not possible.

    It is 0 for models that output no classes: the cost of a fixed budget was measured on classifiers only.

    Args:
        classes: True if the model assigns each row one of several classes, and has learned something.
        gone: part of the blocks that was dropped before estimation.
    """
    return max(SHORT, gone) if classes else 0.0


def cost_in_words(nats: float, points_per_nat: float | None) -> str:
    """Return a rise of the loss as text, in the unit of the tolerance.

    Args:
        nats: the rise.
        points_per_nat: points of the task's metric per nat; None: the tolerance is in nats.

    Example:
        >>> cost_in_words(0.02, 25.0)
        '0.5 points'
    """
    value, unit = (nats, "nat") if points_per_nat is None else (nats * points_per_nat, "point")
    shown = f"{float(f'{value:.2g}'):g}"
    return f"{shown} {unit}{'s' * (shown != '1')}"


def tolerance_in_words(nats: float, points_per_nat: float | None) -> str:
    """Return a tolerance as text; for one in points, also the equivalent rise of the loss.

    Example:
        >>> tolerance_in_words(0.04, 25.0)
        '1 point (0.04 nats)'
    """
    loss = "" if points_per_nat is None else f" ({cost_in_words(nats, None)})"
    return f"{cost_in_words(nats, points_per_nat)}{loss}"


@dataclass(frozen=True)
class FoundBudget:
    """Result of a budget search, with the expected cost; a rise is the loss minus that with nothing cut, in nats."""

    blocks: float
    """Budget as a part of the blocks; 0: no cut is within the tolerance, or none could be measured."""
    tolerance: float
    """Tolerance in nats; 0 if nothing was measured."""
    expected: Expected | None
    """Expected cost of the budget; None if that is 0 or fixed."""
    before: dict[float, float]
    """Budget -> rise right after its cut."""
    probed: list[Probed]
    """Probed budgets. Empty if estimation taught the model too little: its loss is hardly below that of the label
    frequencies or, for models without classes, even the largest cut does not surely raise it."""
    rows: int
    """Held-out rows that losses were measured on."""
    steps: int
    """Training steps of a probe."""
    learned: float | None = None
    """Decrease of the loss in estimation, relative to the loss of the label frequencies; None: not known."""
    points_per_nat: float | None = None
    """Points of the task's metric per nat of its loss; None: the tolerance is in nats."""
    of_plain: float | None = None
    """Cost of the search as a part of plain PEFT's run, in passes through the model; None: not known."""
    seconds: float = 0.0
    """Duration of the search."""
    unmeasured: str | None = None
    """Reason why nothing was measured, so that the budget is fixed or 0; None: it was measured."""

    @classmethod
    def fixed(cls, unmeasured: str, learned: float | None, gone: float = 0.0) -> FoundBudget:
        """Return the budget of a run that cannot search for one: fixed, or 0 for models without classes.

        Args:
            unmeasured: reason why no search is possible.
            learned: decrease of the loss in estimation, relative to the loss of the label frequencies; None: not
                known, as for models without classes. These are not cut, because the cost of a fixed budget was
                measured on classifiers only; nor are models that have learned nothing yet.
            gone: part of the blocks that was dropped before estimation.
        """
        able = learned is not None and has_learned(learned)
        blocks = fixed_budget(able, gone)
        return cls(
            blocks, 0.0, expected=None, before={}, probed=[], rows=0, steps=0, learned=learned, unmeasured=unmeasured
        )

    def summary(self) -> str:
        """Return the result in one line."""
        if self.unmeasured is not None and self.blocks:
            return f"light: auto cuts {self.blocks:.0%} of the blocks, a fixed budget for short runs: {self.unmeasured}"
        if self.unmeasured is not None:
            why = "a fixed budget is for classifiers only"
            if self.learned is not None:
                why = "after estimation the model is hardly better than the label frequencies"
            to_cut = "set a number, such as light: 0.2, to cut anyway"
            return f"light: auto cuts nothing of the blocks: {self.unmeasured}, and {why}; {to_cut}"
        part = "" if self.of_plain is None else f", {self.of_plain:.0%} of the computation of plain PEFT's run"
        how = f"measured on {self.rows} rows in {self.seconds:.0f} s{part}"
        allowed = f"the tolerance is {tolerance_in_words(self.tolerance, self.points_per_nat)}"
        if not self.probed:
            most = max(self.before)
            why = f"even a cut of {most:.0%} does not clearly raise the loss (by {self._in_words(self.before[most])})"
            if self.learned is not None and not has_learned(self.learned):
                why = "the model is hardly better than the label frequencies"
            longer = "estimation was too short; raise light.estimate.length, or set a number to cut"
            return f"light: auto cuts nothing of the blocks: {why}, so {longer}; {how}"
        if self.expected is None:
            least = min(self.probed, key=lambda probed: probed.blocks)
            cost = f"{least.blocks:.0%} would cost {self._in_words(least.after)} after {self.steps} steps"
            return f"light: auto cuts nothing of the blocks: {cost}, and {allowed}; {how}"
        cost = f"that is expected to cost {self._in_words(self.expected.left)}"
        bound = f"at most {self._in_words(self.expected.upper)} with a confidence of {CONFIDENCE:.0%}, and {allowed}"
        return f"light: auto cuts {self.blocks:.0%} of the blocks: {cost}, {bound}; {how}"

    def _in_words(self, nats: float) -> str:
        return cost_in_words(nats, self.points_per_nat)

    def facts(self) -> dict[str, Any]:
        """Return the result as plain data for JSON."""
        before = [{"blocks": blocks, "rise": rise} for blocks, rise in sorted(self.before.items())]
        return {**asdict(self), "before": before, "confidence": CONFIDENCE}
