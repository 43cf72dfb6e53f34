"""A plan as a picture of characters, for places that show no figures: model cards, terminals, diffs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest

from lightpeft.plans.block_plan import BlockPlan
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.plans.structure import BlockSpec

_KEPT, _REMOVED = "█", "░"
_BAR = 20
"""Characters of a bar."""
UNITS: dict[str, tuple[Callable[[BlockSpec], int], Callable[[BlockPlan], int]]] = {
    "Attention heads": (lambda spec: spec.heads, lambda kept: len(kept.heads)),
    "FFN neurons": (lambda spec: spec.neurons, lambda kept: len(kept.neurons)),
    "Experts": (lambda spec: spec.experts, lambda kept: len(kept.experts)),
    "Neurons of each expert": (lambda spec: spec.expert_width, lambda kept: kept.expert_width),
}
"""Kind of unit -> functions that give a block's number of units, and the number kept."""


def plan_picture(plan: PrunePlan) -> str:
    """Draw a row for each block: a bar for each kind of unit that it has, filled as far as units stay."""
    shown = {name: column for name, column in UNITS.items() if any(map(column[0], plan.specs))}
    rows = [["Layer", *shown]]
    for spec, kept in zip_longest(plan.specs, plan.blocks):
        cells = (_bar(dense(spec), stay(kept) if kept else 0) for dense, stay in shown.values())
        rows.append([spec.label or str(spec.index), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _bar(dense: int, kept: int) -> str:
    if not dense:
        return "-"
    filled = max(round(_BAR * kept / dense), int(kept > 0))
    return f"{_KEPT * filled}{_REMOVED * (_BAR - filled)} {kept:>{len(str(dense))}}/{dense}"
