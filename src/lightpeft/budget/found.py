"""The budget that a search found, or that stands in for one: what it is expected to cost, and how it is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightpeft.budget.search import CONFIDENCE, Expected, Probed
from lightpeft.budget.tolerance import cost_in_words, tolerance_in_words
from lightpeft.prune.learning import LEAST_LEARNED

SHORT = 0.4
"""Of the blocks, what goes of a classifier whose run is too short for a search, as measured on files of 300 to 1,000
rows (docs/explanation/results.md)."""


def has_learned(part: float) -> bool:
    """Whether a model that has taken such a part off the loss of an answer by frequencies can tell what a cut costs."""
    return part >= LEAST_LEARNED


def fixed_budget(classes: bool, gone: float = 0.0) -> float:
    """Part of the blocks that goes where nobody says how much, and a search is not possible.

    Nothing goes of models that give no classes, since what a fixed budget costs was measured of classifiers alone.

    Args:
        classes: whether the model gives a row one of several classes, and has learned something.
        gone: part of the blocks that is gone before.
    """
    return max(SHORT, gone) if classes else 0.0


@dataclass(frozen=True)
class FoundBudget:
    """What was found, and what it is expected to cost; rises are those of the loss against nothing cut, in nats."""

    blocks: float
    """0: no cut is within the tolerance, or none could be measured."""
    tolerance: float
    """Nats; 0 where nothing was measured."""
    expected: Expected | None
    """Of the budget that was found; None where that is 0."""
    before: dict[float, float]
    """Budget -> rise when it is cut."""
    probed: list[Probed]
    """Empty where estimation taught too little to tell: the model does hardly better than an answer by the frequencies
    of labels or, where it has none, even the largest cut costs nothing for sure."""
    rows: int
    """That losses were measured on."""
    steps: int
    """Of a probe."""
    learned: float | None = None
    """Part of the loss of an answer by the frequencies of labels that estimation took away; None: not known."""
    points_a_nat: float | None = None
    """Of the task's metric that a nat is worth; None: the tolerance is in nats."""
    of_plain: float | None = None
    """Part of the time of plain PEFT's run that it took, by the count of passes through the model; None: not known."""
    seconds: float = 0.0
    """That all of it took."""
    unmeasured: str | None = None
    """Why nothing could be measured, so that the budget is a fixed one, or nothing; None: it was."""

    @classmethod
    def fixed(cls, unmeasured: str, learned: float | None, gone: float = 0.0) -> FoundBudget:
        """The budget of a run that cannot search for one.

        Args:
            unmeasured: why it cannot.
            learned: part of the loss of an answer by the frequencies of labels that estimation took away; None: not
                known, as of models that give no classes. Nothing goes of these, since what a fixed budget costs was
                measured of classifiers alone, nor of models that have learned nothing yet.
            gone: part of the blocks that is gone before.
        """
        able = learned is not None and has_learned(learned)
        blocks = fixed_budget(able, gone)
        return cls(
            blocks, 0.0, expected=None, before={}, probed=[], rows=0, steps=0, learned=learned, unmeasured=unmeasured
        )

    def summary(self) -> str:
        """What was found, in one line."""
        if self.unmeasured is not None and self.blocks:
            return f"{self.blocks:.0%} of the blocks go, a fixed budget for short runs: {self.unmeasured}"
        if self.unmeasured is not None:
            why = "what a fixed one costs is known of classifiers alone"
            if self.learned is not None:
                why = "estimation has taught the model hardly more than the frequencies of labels"
            to_cut = "give a number, such as light: 0.2, to cut all the same"
            return f"nothing of the blocks goes: {self.unmeasured}, and {why}; {to_cut}"
        part = "" if self.of_plain is None else f", {self.of_plain:.0%} of plain PEFT's run by its passes"
        how = f"measured on {self.rows} rows in {self.seconds:.0f} s{part}"
        allowed = f"the tolerance is {tolerance_in_words(self.tolerance, self.points_a_nat)}"
        if not self.probed:
            most = max(self.before)
            why = f"even {most:.0%} do not raise the loss for sure (by {self._said(self.before[most])})"
            if self.learned is not None and not has_learned(self.learned):
                why = "the model does hardly better than an answer by the frequencies of labels"
            longer = (
                "estimation taught too little to tell; lengthen it (light.estimate.length), or give a number to cut"
            )
            return f"light: auto cuts nothing of the blocks: {why}, so {longer}; {how}"
        if self.expected is None:
            least = min(self.probed, key=lambda probed: probed.blocks)
            cost = f"{least.blocks:.0%} would cost {self._said(least.after)} after {self.steps} steps"
            return f"light: auto cuts nothing of the blocks: {cost}, and {allowed}; {how}"
        cost = f"that is expected to cost {self._said(self.expected.left)}"
        bound = f"at most {self._said(self.expected.upper)} with a confidence of {CONFIDENCE:.0%}, and {allowed}"
        return f"light: auto cuts {self.blocks:.0%} of the blocks: {cost}, {bound}; {how}"

    def _said(self, nats: float) -> str:
        return cost_in_words(nats, self.points_a_nat)

    def facts(self) -> dict[str, Any]:
        """The same as plain data."""
        before = [{"blocks": blocks, "rise": rise} for blocks, rise in sorted(self.before.items())]
        return {**asdict(self), "before": before, "confidence": CONFIDENCE}
