"""A plan as a small picture in text: one row a block, with bars of what stays."""

from __future__ import annotations

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
    """One row a block: heads and neurons that stay, as bars and numbers, and PEFT modules with their ranks.

    A dot stands for a module that went; a block that was left out whole has none.
    """
    rows = [_row(plan, spec, kept) for spec, kept in zip_longest(plan.specs, plan.blocks)]
    rows.insert(0, ("layer", "heads", "", "neurons", "", "modules:ranks"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _row(plan: PrunePlan, spec: BlockSpec, kept: BlockPlan | None) -> tuple[str, ...]:
    label = spec.label or str(spec.index)
    if kept is None:
        return (label, bar(0, 1), f"0/{spec.heads}", bar(0, 1), f"0/{spec.neurons}", "left out")
    neurons = (
        (bar(len(kept.neurons), spec.neurons), f"{len(kept.neurons)}/{spec.neurons}") if spec.neurons else ("", "")
    )
    heads = (bar(len(kept.heads), spec.heads), f"{len(kept.heads)}/{spec.heads}") if spec.heads else ("", "")
    return (label, *heads, *neurons, _modules(plan, spec))


def _modules(plan: PrunePlan, spec: BlockSpec) -> str:
    dense = [site for site in plan.dense_sites if site.block == spec.index]
    return " ".join(f"{site.slot}:{len(plan.sites[site.name])}" if site.name in plan.sites else "·" for site in dense)
