"""`light: auto`: the budget of a model whose estimation is over.

`plans.budgets` is the search, `prune.probing` what it asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from lightpeft.config import LightConfig, Tolerance
from lightpeft.plans.budgets import (
    CONFIDENCE,
    BudgetSearch,
    Expected,
    Probed,
    cost_in_words,
    fixed_budget,
    tolerance_in_words,
)
from lightpeft.plans.planning import make_plan
from lightpeft.plans.records import EstimationRecord
from lightpeft.profiling.live import Batch, losses_and_classes_of, losses_of
from lightpeft.prune.curve import gone_before, loss_curve, nested_plans
from lightpeft.prune.learning import LEAST_LEARNED, classes_of, loss_by_frequencies, one_of_several
from lightpeft.prune.probing import Probe

Worth = Callable[[Tensor, Tensor], float]
"""The classes that a model gives some rows, and those that are right, both [rows] -> points of the task's metric that a
nat of its loss is worth."""
PARTS = (0.2, 0.4, 0.6)
"""Of the blocks that are there, what is cut to see the rise of the loss before anything trains; between them it lies on
a line. No more than the last is found of a model that has all of its blocks (`plans.budgets.MOST`)."""


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
        able = learned is not None and learned >= LEAST_LEARNED
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
            if self.learned is not None and self.learned < LEAST_LEARNED:
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


def find_budget(
    model: PeftModel,
    record: EstimationRecord,
    light: LightConfig,
    probe: Probe,
    tolerance: Tolerance,
    worth: Worth | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> FoundBudget:
    """Measure, and find the largest budget within the tolerance.

    Args:
        model: as estimation left it; it stays so. Beside it there is one copy at a time, of what a cut leaves.
        tolerance: what a budget may cost.
        worth: of a tolerance in points.
        announce: told of each copy before it trains.

    Raises:
        LightPeftError: the model gives no loss, or no budget can be tried at all.
    """
    # a cut of ranks throws away what they have learned, which hides all else
    light = light.with_whole_modules()
    gone = gone_before(record)
    parts = [round(gone + part * (1 - gone), 3) for part in PARTS]
    plans = dict(nested_plans(record, light, parts))
    few = probe.held[: probe.few]
    losses, points_a_nat = _whole(model, few if worth is None else probe.held, probe.autocast, worth)
    _, curve = loss_curve(model, plans, few, probe.autocast, losses[: len(few)])
    nats = tolerance.amount / (points_a_nat or 1.0)
    search = BudgetSearch({each.blocks: each.rise for each in curve}, nats, gone, points_a_nat)

    def after_steps(blocks: float | None) -> Tensor:
        """Losses when a copy has been cut and has trained."""
        copy = len(search.probed) + (1 if blocks is None else 2)
        said = f"{blocks:.0%} of the blocks cut" if blocks else "nothing cut"
        announce(f"light: auto, copy {copy} of {1 + search.most} at most: {said}, {probe.steps} steps")
        return probe.losses(model, None if blocks is None else make_plan(record, light.removing(blocks)))

    chance = chance_of(model, probe.held[: len(losses)])
    learned = None if chance is None else 1 - float(losses.mean()) / max(chance, 1e-6)
    # a classifier's loss tells whether it has learned something; of others, whether a cut raises theirs
    taught = curve[-1].interval[0] > 0 if learned is None else learned >= LEAST_LEARNED
    found = 0.0
    if taught:
        whole = after_steps(None)
        allows = None if probe.cost is None else probe.cost.allows
        found = search.run(lambda blocks: after_steps(blocks) - whole, allows)
    return FoundBudget(
        blocks=found,
        tolerance=nats,
        expected=search.expected(found) if found else None,
        before={each.blocks: each.rise for each in curve},
        probed=search.probed,
        rows=len(probe.rows),
        steps=probe.steps,
        learned=learned,
        points_a_nat=points_a_nat,
        of_plain=None if probe.cost is None else probe.cost.of_plain([each.blocks for each in search.probed]),
    )


def _whole(
    model: PeftModel, batches: Sequence[Batch], autocast: torch.dtype | None, worth: Worth | None
) -> tuple[Tensor, float | None]:
    """The losses of batches with nothing cut, [batches], and by the same pass what a nat is worth in points."""
    if worth is None:
        return losses_of(model, batches, autocast), None
    losses, classes = losses_and_classes_of(model, batches, autocast)
    return losses, worth(classes, torch.cat([batch["labels"] for batch in batches]))


def chance_of(model: PeftModel, batches: Sequence[Batch]) -> float | None:
    """The loss, in nats, of an answer that gives every class the part of these rows that it has.

    Returns:
        None where the model does not give a row one of several classes.
    """
    if not classes_of(model) or not all("labels" in batch for batch in batches):  # a span has two ends
        return None
    labels = [batch["labels"] for batch in batches]
    if not all(one_of_several(of) for of in labels):
        return None
    return loss_by_frequencies(torch.cat(labels).bincount())
