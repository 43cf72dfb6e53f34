"""`light: auto`: find the budget of a model right after estimation.

`budget.search` chooses the budgets that `budget.probes` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from peft import PeftModel
from torch import Tensor

from lightpeft.budget.curve import gone_before, loss_curve, nested_plans
from lightpeft.budget.found import FoundBudget, has_learned
from lightpeft.budget.probes import Probe
from lightpeft.budget.room import SEARCH_BUDGETS
from lightpeft.budget.search import PROBES, BudgetSearch
from lightpeft.config import LightConfig, Tolerance
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.planning import make_plan
from lightpeft.profiling.live import Batch, losses_and_classes_of, losses_of
from lightpeft.prune.learning import classes_of, loss_by_frequencies, one_of_several

Worth = Callable[[Tensor, Tensor], float]
"""Function of predicted and labeled classes of some rows, both [rows]; returns points of the task's metric per nat of
its loss."""


def find_budget(
    model: PeftModel,
    record: EstimationRecord,
    light: LightConfig,
    probe: Probe,
    tolerance: Tolerance,
    worth: Worth | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> FoundBudget:
    """Measure cuts, and find the largest budget whose expected cost is within the tolerance.

    Args:
        model: the model right after estimation; unchanged. Memory holds one cut copy at a time beside it.
        record: scores of the estimation.
        light: settings whose budget is replaced.
        probe: trains and measures copies.
        tolerance: largest cost of a budget.
        worth: converts points into nats; None: the tolerance is in nats.
        announce: called with one line before each copy trains.

    Raises:
        LightPeftError: the model returns no loss, or no plan can be made for any budget.
    """
    # a cut of ranks throws away what they have learned, which hides all else
    light = light.with_all_modules()
    gone = gone_before(record)
    parts = [round(gone + part * (1 - gone), 3) for part in SEARCH_BUDGETS]
    plans = dict(nested_plans(record, light, parts))
    few = probe.held[: probe.few]
    losses, points_per_nat = _measure_uncut(model, few if worth is None else probe.held, probe.autocast, worth)
    _, curve = loss_curve(model, plans, few, probe.autocast, losses[: len(few)])
    nats = tolerance.amount / (points_per_nat or 1.0)
    search = BudgetSearch({each.blocks: each.rise for each in curve}, nats, gone)

    def after_steps(blocks: float | None) -> Tensor:
        """Losses of a copy after its cut and a few steps of training, [batches]."""
        copy = len(search.probed) + (1 if blocks is None else 2)
        said = f"{blocks:.0%} of the blocks cut" if blocks else "nothing cut"
        announce(f"light: auto, probe {copy} of at most {1 + PROBES}: {said}, {probe.steps} training steps")
        return probe.losses(model, None if blocks is None else make_plan(record, light.with_blocks(blocks)))

    chance = chance_of(model, probe.held[: len(losses)])
    learned = None if chance is None else 1 - float(losses.mean()) / max(chance, 1e-6)
    # a classifier's loss tells whether it has learned something; of others, whether a cut raises theirs
    taught = curve[-1].interval[0] > 0 if learned is None else has_learned(learned)
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
        points_per_nat=points_per_nat,
        of_plain=None if probe.cost is None else probe.cost.of_plain([each.blocks for each in search.probed]),
    )


def _measure_uncut(
    model: PeftModel, batches: Sequence[Batch], autocast: torch.dtype | None, worth: Worth | None
) -> tuple[Tensor, float | None]:
    """Compute the losses with nothing cut, [batches], and from the same pass the points per nat (None: no `worth`)."""
    if worth is None:
        return losses_of(model, batches, autocast), None
    losses, classes = losses_and_classes_of(model, batches, autocast)
    return losses, worth(classes, torch.cat([batch["labels"] for batch in batches]))


def chance_of(model: PeftModel, batches: Sequence[Batch]) -> float | None:
    """Return the loss, in nats, of a constant answer: the label frequencies of these rows.

    Returns:
        None if the model does not assign each row one of several classes.
    """
    if not classes_of(model) or not all("labels" in batch for batch in batches):  # a span has two ends
        return None
    labels = [batch["labels"] for batch in batches]
    if not all(one_of_several(of) for of in labels):
        return None
    return loss_by_frequencies(torch.cat(labels).bincount())
