"""What each budget would cost before training goes on: the losses of nested cuts.

Scores add up what single units are worth, and units that go together cost more than that. Here whole sets are measured:
copies without what a plan takes, forward passes on some rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from lightpeft.config import LightConfig
from lightpeft.errors import LightPeftError, require
from lightpeft.plans.planning import make_plan
from lightpeft.plans.records import EstimationRecord, PrunePlan, block_parameters, removed_parameters
from lightpeft.profiling.live import losses_of
from lightpeft.prune.surgery import cut_copy

PARTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Parts of the blocks' parameters."""
_SIDE = 1.96
"""Standard errors on each side of a 95% interval."""


@dataclass(frozen=True)
class CurvePoint:
    """One budget."""

    blocks: float
    """Part of the blocks' parameters that goes, at least."""
    removed_of_blocks: float
    """That does go; widths are rounded, and heads come in units."""
    removed_of_base: float
    """The same of all base parameters."""
    loss: float
    """Mean over the batches."""
    rise: float
    """Of the loss, against nothing cut."""
    interval: tuple[float, float]
    """95% interval of the rise, paired by batch."""


def nested_plans(
    record: EstimationRecord, light: LightConfig, parts: Sequence[float] = PARTS
) -> Iterator[tuple[float, PrunePlan]]:
    """Plans of growing amounts by the same scores: what goes at one goes at the next, but for the rounding of widths.

    Those that take no more than the one before, as a depth that is gone already may, or that cannot go, are left out.

    Args:
        light: whose amount is replaced.

    Raises:
        LightPeftError: parts that are not in (0, 1), or no plan of them can be made.
    """
    require(all(0 < part < 1 for part in parts), "parts of the blocks lie in (0, 1), for example 0.1 0.2 0.4")
    made, reason, gone = 0, "there are no parts", removed_parameters((), record.left_out)
    for part in sorted(parts):
        try:
            plan = make_plan(record, light.removing(part))
        except LightPeftError as error:
            reason = str(error)
            continue
        if plan.removed_parameters == gone:
            reason = "the depth that is gone is as much already"
            continue
        made, gone = made + 1, plan.removed_parameters
        yield part, plan
    require(made, f"no budget can be tried: {reason}")


def gone_before(record: EstimationRecord) -> float:
    """Part of the blocks' parameters that a depth took before estimation."""
    whole = sum(map(block_parameters, [*record.blocks, *record.left_out]))
    return removed_parameters((), record.left_out) / whole


@torch.no_grad()
def loss_curve(
    model: PeftModel,
    plans: Mapping[float, PrunePlan],
    batches: Sequence[Mapping[str, Tensor]],
    autocast: torch.dtype | None = None,
    dense: Tensor | None = None,
) -> tuple[float, list[CurvePoint]]:
    """The loss with nothing cut, and a point for each plan.

    Args:
        model: as estimation left it; it stays so. Beside it there is one copy at a time, of what a cut leaves.
        plans: by their budgets; they take PEFT modules and ranks as well.
        batches: model inputs with labels; small ones, whose differences say how sure a rise is.
        autocast: half precision of the forward pass.
        dense: losses of these batches with nothing cut; None: they are not known yet.

    Raises:
        LightPeftError: fewer than two batches, or the model gives no loss.
    """
    require(len(batches) > 1, "a curve needs two batches of rows at least; give more rows")
    dense = losses_of(model, batches, autocast) if dense is None else dense
    points = []
    for part, plan in plans.items():
        cut = cut_copy(model, plan)
        points.append(_point(part, plan, losses_of(cut, batches, autocast), dense))
        del cut  # before the next one is there
    return float(dense.mean()), points


def _point(part: float, plan: PrunePlan, losses: Tensor, dense: Tensor) -> CurvePoint:
    rises = losses - dense
    rise, side = float(rises.mean()), _SIDE * float(rises.std()) / math.sqrt(len(rises))
    interval = (rise - side, rise + side)
    return CurvePoint(part, plan.removed_of_blocks, plan.removed_ratio, float(losses.mean()), rise, interval)
