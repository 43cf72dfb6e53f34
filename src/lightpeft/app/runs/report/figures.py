"""The page's figures, drawn from facts. Each fits a phone, or is drawn for a given width."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from lightpeft.app.runs.report.drawing import BLANK, BLUE, GREEN, ORANGE, QUIET, RULE, STYLED, Drawing
from lightpeft.app.runs.report.facts import STAGES, Losses
from lightpeft.budget.found import FoundBudget
from lightpeft.plans.block_plan import BlockPlan
from lightpeft.plans.prune_plan import PrunePlan
from lightpeft.plans.structure import SLOTS, BlockSpec
from lightpeft.saving.picture import UNITS

NARROW = 326.0
"""Width in pixels that fits the smallest screens."""
COLORS = {"estimate": ORANGE, "train": BLUE, "widen": GREEN}
"""Color of each training stage."""


# -- units kept ----------------------------------------------------------------------------------------------------


class _Layers(Drawing):
    """Rows for the blocks of a plan, the lowest block at the bottom, with names on the left."""

    def __init__(self, plan: PrunePlan, label: str, top: float = 6) -> None:
        self.parts: list[tuple[BlockSpec, BlockPlan | None]] = list(zip_longest(plan.specs, plan.blocks))
        pitch = max(7.0, min(22.0, 620.0 / len(self.parts)))
        super().__init__(NARROW, top + pitch * len(self.parts), label)
        self.roomy = pitch >= 11
        self.every = max(1, round(13 / pitch))
        self.axes.set_ylim(-0.5, len(self.parts) - 0.5)
        self.axes.set_xticks([])
        self._label_rows(self.axes, [spec.label or str(spec.index) for spec in plan.specs])

    def bar(self, block: int, start: float, width: float, color: str) -> None:
        """Draw a bar in the row of a block."""
        self.axes.barh(block, width, 0.8, start, color=color)

    def left_out(self, block: int, width: float) -> None:
        """Draw a dotted row for a block that is removed whole."""
        self.axes.hlines(block, 0, width, color=RULE, linestyle=":", linewidth=2)

    def numbers(self, words: Sequence[str]) -> None:
        """Write a text at the right end of each row."""
        right = self.axes.twinx()
        right.set_ylim(self.axes.get_ylim())
        for side in right.spines.values():
            side.set_visible(False)
        self._label_rows(right, words)

    def _label_rows(self, axes: Any, words: Sequence[str]) -> None:
        places = range(0, len(words), self.every)
        axes.set_yticks([*places], [words[place].replace("$", r"\$") for place in places])
        axes.tick_params(axis="y", length=0, labelcolor=QUIET)


@STYLED
def units(plan: PrunePlan, what: str) -> Drawing:
    """Draw the kept units of each block as bars."""
    dense, stays = UNITS[what]
    kept_in_all, of = sum(map(stays, plan.blocks)), sum(map(dense, plan.specs))
    rows = _Layers(plan, f"{what} kept in each layer: {kept_in_all:,} of {of:,}")
    for block, (spec, kept) in enumerate(rows.parts):
        if kept is None:
            rows.left_out(block, max(map(dense, plan.specs)))
        elif dense(spec):
            rows.bar(block, 0, dense(spec), BLANK)
            rows.bar(block, 0, stays(kept), BLUE)
    parts = [(stays(kept) if kept else 0, dense(spec)) for spec, kept in rows.parts]
    rows.numbers([f"{stay}/{of}" if of else "none" for stay, of in parts])
    return rows


@STYLED
def modules(plan: PrunePlan) -> Drawing:
    """Draw the kept rank of each PEFT module: a row per block, a column per projection."""
    dense = {(site.block, site.slot): site.rank for site in plan.dense_sites}
    slots = [slot for slot in SLOTS if any(slot == of for _, of in dense)]
    rows = _Layers(plan, f"PEFT modules kept, with their ranks: {len(plan.sites)} of {len(plan.dense_sites)}", 36)
    names = [slot.replace("ffn_", "ffn\n" if len(slots) > 4 else "ffn ") for slot in slots]
    rows.axes.set_xticks([column + 0.47 for column in range(len(slots))], names)
    rows.axes.tick_params(axis="x", top=False, labeltop=True, labelbottom=False, labelcolor=QUIET)
    for block, (spec, kept) in enumerate(rows.parts):
        if kept is None:
            rows.left_out(block, len(slots))
        for slot, stay in plan.module_ranks(spec).items():
            column, ranks = slots.index(slot), dense[spec.index, slot]
            rows.bar(block, column, 0.94, BLANK)
            rows.bar(block, column, 0.94 * stay / ranks, BLUE)
            if stay and rows.roomy:
                right: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 12, "clip_on": False}
                rows.axes.text(column + 0.9, block, str(stay), **right)
    return rows


# -- losses --------------------------------------------------------------------------------------------------------


@STYLED
def losses(lines: Sequence[Losses], cut: int | None, width: float) -> Drawing:
    """Draw the training loss of all stages over the steps of the run, with a line at the end of estimation.

    Args:
        cut: step at which estimation ended; None: no line.
    """
    figure = Drawing(width, 240 if width > 500 else 210, "Training loss by optimizer step, stage by stage", "y")
    for line in lines:
        steps, values = zip(*line.points, strict=True)
        figure.axes.plot(steps, values, "-o", markersize=3.5, color=COLORS[line.stage], label=STAGES[line.stage])
    figure.axes.set_xlim(left=0)
    if cut is not None:
        figure.axes.axvline(cut, color=QUIET, linewidth=1, linestyle="--")
    figure.axes.set_xlabel("optimizer step", loc="right")
    figure.axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    _legend(figure)
    return figure


def _legend(figure: Drawing) -> None:
    if figure.axes.get_legend_handles_labels()[1]:
        figure.figure.legend(loc="outside upper left", ncols=4, handlelength=1, handletextpad=0.4, columnspacing=1)


# -- the budget that was found -------------------------------------------------------------------------------------


@STYLED
def budget(found: FoundBudget) -> Drawing:
    """Draw the measured rise of the loss at the probed budgets, and the expected one at the budget that was found."""
    figure = Drawing(NARROW, 220, "Rise of the loss at the probed budgets and, expected, at the chosen one", "both")
    figure.axes.axhline(0, color=RULE, linewidth=0.8)
    worth = found.points_per_nat or 1.0
    figure.axes.axhline(worth * found.tolerance, color=QUIET, linewidth=1, linestyle="--", label="tolerance")
    for number, point in enumerate(found.probed):
        x, before, after, error = 100 * point.blocks, worth * point.before, worth * point.after, worth * point.error
        _point(figure, x, before, QUIET, "when cut" if not number else "")
        _point(figure, x, after, GREEN, "after a probe" if not number else "", (error, error))
    if found.expected is not None:
        left, upper = worth * found.expected.left, worth * found.expected.upper
        _point(figure, 100 * found.blocks, left, BLUE, "expected", (0, upper - left))
    figure.axes.set_xlim(left=0)
    figure.axes.autoscale(axis="x")
    figure.axes.set_xlabel("part of the blocks removed, %", loc="right")
    _legend(figure)
    return figure


def _point(figure: Drawing, x: float, y: float, color: str, name: str, reach: tuple[float, float] = (0, 0)) -> None:
    """Draw a dot with an error bar.

    Args:
        reach: length of the bar below and above the dot.
    """
    below, above = (max(each, 0) for each in reach)
    figure.axes.errorbar(x, y, yerr=[[below], [above]], fmt="o", color=color, label=name)
