"""A plan as a small picture in text: one row a block, with bars of what stays."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from lightpeft.plans.records import BlockPlan, PrunePlan
from lightpeft.plans.structure import BlockSpec

WIDTH = 12
"""Characters of a bar that is full."""
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_EMPTY = "░"


def bar(kept: int, dense: int, width: int = WIDTH) -> str:
    """How much stays, in eighths of a character; what stays is never shown as nothing, nor what goes as all."""
    eighths = round(8 * width * kept / dense) if dense else 0
    if 0 < kept < dense:
        eighths = min(max(eighths, 1), 8 * width - 1)
    full, part = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[part] if part else "")).ljust(width, _EMPTY)


def picture(plan: PrunePlan) -> str:
    """One row a block: heads, neurons and experts (with the neurons of each) that stay, as bars and numbers, where the
    model has any, and PEFT modules with their ranks.

    A dot stands for a module that went; a block that was left out whole has none.
    """
    columns = [name for name in _COLUMNS if any(_sizes(spec, None)[name][1] for spec in plan.specs)]
    rows = [_row(plan, spec, kept, columns) for spec, kept in zip_longest(plan.specs, plan.blocks)]
    rows.insert(0, ("layer", *(title for name in columns for title in (name, "")), "modules:ranks"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


_COLUMNS = ("heads", "neurons", "experts", "neurons of each")


def _sizes(spec: BlockSpec, kept: BlockPlan | None) -> dict[str, tuple[int, int]]:
    """Column -> how many units stay, of how many."""
    stay = kept or BlockPlan((), (), ())
    return {
        "heads": (len(stay.heads), spec.heads),
        "neurons": (len(stay.neurons), spec.neurons),
        "experts": (len(stay.experts), spec.experts),
        "neurons of each": (stay.expert_width, spec.expert_width),
    }


def _row(plan: PrunePlan, spec: BlockSpec, kept: BlockPlan | None, columns: Sequence[str]) -> tuple[str, ...]:
    sizes = _sizes(spec, kept)
    cells: list[str] = []
    for name in columns:
        stay, dense = sizes[name]
        cells += [bar(stay, dense), f"{stay}/{dense}"] if dense else ["", ""]
    return (spec.label or str(spec.index), *cells, _modules(plan, spec) if kept is not None else "left out")


def _modules(plan: PrunePlan, spec: BlockSpec) -> str:
    dense = [site for site in plan.dense_sites if site.block == spec.index]
    return " ".join(f"{site.slot}:{len(plan.sites[site.name])}" if site.name in plan.sites else "·" for site in dense)
