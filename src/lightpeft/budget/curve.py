"""The loss right after nested cuts of several sizes, before any further training.

Scores measure units one by one, and units that are cut together cost more than the sum of their scores. So whole cuts
are measured here: forward passes of cut copies on some rows.
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
from lightpeft.plans.block_plan import block_parameters, removed_parameters
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.plans.planning import make_plan
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.profiling.live import losses_of
from lightpeft.prune.surgery import cut_copy

CURVE_BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Default budgets of a curve, as parts of the blocks' parameters."""
_INTERVAL_ERRORS = 1.96
"""Standard errors on each side of a 95% interval."""


@dataclass(frozen=True)
class CurvePoint:
    """One budget of a loss curve; losses are in nats."""

    blocks: float
    """Budget: part of the blocks' parameters to remove at least."""
    removed_of_blocks: float
    """Part of the blocks' parameters that the plan removes; widths are rounded, and heads come in units."""
    removed_of_base: float
    """Part of all base parameters that the plan removes."""
    loss: float
    """Loss after the cut, mean over the batches."""
    rise: float
    """Loss after the cut minus the loss with nothing cut."""
    interval: tuple[float, float]
    """95% confidence interval of the rise, paired by batch."""


def nested_plans(
    record: EstimationRecord, light: LightConfig, parts: Sequence[float] = CURVE_BUDGETS
) -> Iterator[tuple[float, PrunePlan]]:
    """Yield plans of growing budgets from the same scores; each cut contains the previous one, up to rounded widths.

    Budgets that remove no more than the one before (a dropped depth may be as much already), or that cannot be
    planned, are skipped.

    Args:
        record: scores of the estimation.
        light: settings whose budget is replaced.
        parts: budgets, as parts of the blocks' parameters.

    Yields:
        (budget, plan).

    Raises:
        LightPeftError: a budget is not in (0, 1), or no plan can be made of any.
    """
    require(
        all(0 < part < 1 for part in parts), "budgets must be fractions of the blocks in (0, 1), such as 0.1 0.2 0.4"
    )
    made, reason, gone = 0, "no budgets are given", removed_parameters((), record.left_out)
    for part in sorted(parts):
        try:
            plan = make_plan(record, light.with_blocks(part))
        except LightPeftError as error:
            reason = str(error)
            continue
        if plan.removed_parameters == gone:
            reason = "light.remove.depth already drops as many blocks"
            continue
        made, gone = made + 1, plan.removed_parameters
        yield part, plan
    require(made, f"no plan can be made for any budget: {reason}")


def gone_before(record: EstimationRecord) -> float:
    """Return the part of the blocks' parameters that `light.remove.depth` removed before estimation."""
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
    """Measure the loss with nothing cut, and after each plan's cut without further training.

    Args:
        model: the model right after estimation; unchanged. Memory holds one cut copy at a time beside it.
        plans: budget -> plan, PEFT modules and ranks included.
        batches: model inputs with labels; many small batches, whose spread gives the interval.
        autocast: half precision of the forward pass; None: none.
        dense: losses of these batches with nothing cut, [batches]; None: they are computed here.

    Returns:
        Mean loss with nothing cut, in nats, and one point per plan.

    Raises:
        LightPeftError: fewer than two batches, or the model returns no loss.
    """
    require(len(batches) > 1, "a loss curve needs at least two batches of rows; use more rows")
    dense = losses_of(model, batches, autocast) if dense is None else dense
    points = []
    for part, plan in plans.items():
        cut = cut_copy(model, plan)
        points.append(_curve_point(part, plan, losses_of(cut, batches, autocast), dense))
        del cut  # before the next one is there
    return float(dense.mean()), points


def _curve_point(part: float, plan: PrunePlan, losses: Tensor, dense: Tensor) -> CurvePoint:
    rises = losses - dense
    rise, side = float(rises.mean()), _INTERVAL_ERRORS * float(rises.std()) / math.sqrt(len(rises))
    interval = (rise - side, rise + side)
    return CurvePoint(part, plan.removed_of_blocks, plan.removed_ratio, float(losses.mean()), rise, interval)
