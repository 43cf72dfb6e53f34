"""The page's figures: facts in, drawings out. Each fits a phone, or is drawn for a width that is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from lightpeft.app.runs.report.drawing import BLANK, BLUE, GREEN, ORANGE, QUIET, RULE, STYLED, Drawing
from lightpeft.app.runs.report.facts import Losses
from lightpeft.app.runs.report.words import count, interval, is_part, metric_name, quality
from lightpeft.budget.found import FoundBudget
from lightpeft.errors import require
from lightpeft.plans.records import BlockPlan, PrunePlan
from lightpeft.plans.structure import SLOTS, BlockSpec

NARROW = 326.0
"""Pixels that the smallest screens have room for."""
COLOURS = {"estimate": ORANGE, "train": BLUE, "widen": GREEN}
"""Stage that trains -> its colour."""
Ends = tuple[float, float] | None
"""Of an interval."""
_SMALL: dict[str, Any] = {"fontsize": 12, "clip_on": False}


# -- what stays ----------------------------------------------------------------------------------------------------


class _Layers(Drawing):
    """Rows for the blocks of a plan, the lowest block at the bottom, with names on the left."""

    def __init__(self, plan: PrunePlan, label: str, top: float = 6) -> None:
        self.parts: list[tuple[BlockSpec, BlockPlan | None]] = list(zip_longest(plan.specs, plan.blocks))
        self.names = [spec.label or str(spec.index) for spec in plan.specs]
        pitch = max(7.0, min(22.0, 620.0 / len(self.parts)))
        super().__init__(NARROW, top + pitch * len(self.parts), label)
        self.roomy = pitch >= 11
        self.every = max(1, round(13 / pitch))
        self.axes.set_ylim(-0.5, len(self.parts) - 0.5)
        self.axes.set_xticks([])
        self._number(self.axes, self.names)

    def bar(self, block: int, start: float, width: float, colour: str, words: str) -> None:
        """A bar in a row."""
        (bar,) = self.axes.barh(block, width, 0.8, start, color=colour)
        self.hint(bar, words)

    def left_out(self, block: int, width: float) -> None:
        """A row of a block that is gone whole."""
        line = self.axes.hlines(block, 0, width, color=RULE, linestyle=":", linewidth=2)
        self.hint(line, "left out whole")

    def numbers(self, words: Sequence[str]) -> None:
        """What stays, at the right end of each row."""
        right = self.axes.twinx()
        right.set_ylim(self.axes.get_ylim())
        for side in right.spines.values():
            side.set_visible(False)
        self._number(right, words)

    def _number(self, axes: Any, words: Sequence[str]) -> None:
        places = range(0, len(words), self.every)
        axes.set_yticks([*places], [words[place].replace("$", r"\$") for place in places])
        axes.tick_params(axis="y", length=0, labelcolor=QUIET)


@STYLED
def heads(plan: PrunePlan) -> Drawing:
    """Every query head of every block, those that stay filled; heads that share keys and values stand together."""
    kept_in_all, of = sum(len(block.heads) for block in plan.blocks), sum(spec.heads for spec in plan.specs)
    rows = _Layers(plan, f"Attention heads that stay, layer by layer: {kept_in_all} of {of}")
    for block, (spec, kept) in enumerate(rows.parts):
        if kept is None:
            rows.left_out(block, spec.heads)
            continue
        words = f"layer {rows.names[block]}: {len(kept.heads)} of {spec.heads} heads stay"
        gone = [head for head in range(spec.heads) if head not in set(kept.heads)]
        gap = 0.08 if spec.heads_per_kv > 1 else 0.0  # what a group leaves to the next one
        for some, colour in ((gone, BLANK), (kept.heads, BLUE)):
            places = [(head - gap * (head % spec.heads_per_kv), 0.9 - gap) for head in some]
            rows.hint(rows.axes.broken_barh(places, (block - 0.4, 0.8), color=colour), words)
    rows.numbers([f"{len(kept.heads) if kept else 0}/{spec.heads}" for spec, kept in rows.parts])
    return rows


@STYLED
def neurons(plan: PrunePlan) -> Drawing:
    """How many of a block's FFN neurons stay."""
    return _widths(plan, "FFN neurons", lambda spec: spec.neurons, lambda kept: len(kept.neurons))


@STYLED
def experts(plan: PrunePlan) -> Drawing:
    """How many of a block's routed experts stay."""
    return _widths(plan, "experts", lambda spec: spec.experts, lambda kept: len(kept.experts))


@STYLED
def expert_neurons(plan: PrunePlan) -> Drawing:
    """How many neurons stay of each expert that stays."""
    return _widths(plan, "neurons of each expert", lambda spec: spec.expert_width, lambda kept: kept.expert_width)


def _widths(
    plan: PrunePlan, what: str, dense: Callable[[BlockSpec], int], stays: Callable[[BlockPlan], int]
) -> Drawing:
    """How many of some units of a block stay, as bars."""
    kept_in_all, of = sum(map(stays, plan.blocks)), sum(map(dense, plan.specs))
    label = f"{what[0].upper()}{what[1:]} that stay, layer by layer: {count(kept_in_all)} of {count(of)}"
    rows = _Layers(plan, label)
    for block, (spec, kept) in enumerate(rows.parts):
        if kept is None:
            rows.left_out(block, max(map(dense, plan.specs)))
        elif dense(spec):
            words = f"layer {rows.names[block]}: {stays(kept):,} of {dense(spec):,} {what.removeprefix('FFN ')} stay"
            rows.bar(block, 0, dense(spec), BLANK, words)
            rows.bar(block, 0, stays(kept), BLUE, words)
    parts = [(stays(kept) if kept else 0, dense(spec)) for spec, kept in rows.parts]
    rows.numbers([f"{stay}/{of}" if of else "none" for stay, of in parts])
    return rows


@STYLED
def modules(plan: PrunePlan) -> Drawing:
    """Every PEFT module, a column for each place in a block: how many of its ranks stay."""
    dense = {(site.block, site.slot): site.rank for site in plan.dense_sites}
    slots = [slot for slot in SLOTS if any(slot == of for _, of in dense)]
    rows = _Layers(plan, f"PEFT modules that stay, with their ranks: {len(plan.sites)} of {len(plan.dense_sites)}", 36)
    names = [slot.replace("ffn_", "ffn\n" if len(slots) > 4 else "ffn ") for slot in slots]
    rows.axes.set_xticks([column + 0.47 for column in range(len(slots))], names)
    rows.axes.tick_params(axis="x", top=False, labeltop=True, labelbottom=False, labelcolor=QUIET)
    for block, (spec, kept) in enumerate(rows.parts):
        if kept is None:
            rows.left_out(block, len(slots))
        for slot, stay in plan.module_ranks(spec).items():
            column, ranks = slots.index(slot), dense[spec.index, slot]
            words = f"layer {rows.names[block]}, {slot}: {stay} of {ranks} ranks stay"
            rows.bar(block, column, 0.94, BLANK, words)
            rows.bar(block, column, 0.94 * stay / ranks, BLUE, words)
            if stay and rows.roomy:
                rows.axes.text(column + 0.9, block, str(stay), ha="right", va="center", **_SMALL)
    return rows


# -- losses --------------------------------------------------------------------------------------------------------


@STYLED
def losses(lines: Sequence[Losses], cut: int | None, mark: str, width: float) -> Drawing:
    """The training loss of all stages over the steps of the run, with a mark where it was cut."""
    figure = Drawing(width, 240 if width > 500 else 210, "Training loss by optimizer step, stage by stage", "y")
    _check_range(loss for line in lines for _, loss in line.points)
    for line in lines:
        steps, values = zip(*line.points, strict=True)
        figure.axes.plot(steps, values, "-o", markersize=3.5, color=COLOURS[line.stage], label=line.title)
    figure.axes.set_xlim(left=0)
    if cut is not None:
        figure.axes.axvline(cut, color=QUIET, linewidth=1, linestyle="--")
        late = cut > 0.6 * figure.axes.get_xlim()[1]
        place: dict[str, Any] = {"ha": "right" if late else "left", "textcoords": "offset points"}
        below = (cut, 0), (-5 if late else 5, 5)
        figure.axes.annotate(f"{mark}, step {cut:,}", *below, xycoords=("data", "axes fraction"), **place)
    figure.axes.set_xlabel("optimizer step", loc="right")
    figure.axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    _legend(figure)
    return figure


def _legend(figure: Drawing) -> None:
    if figure.axes.get_legend_handles_labels()[1]:
        figure.figure.legend(loc="outside upper left", ncols=4, handlelength=1, handletextpad=0.4, columnspacing=1)


# -- values in rows ------------------------------------------------------------------------------------------------


@STYLED
def intervals(rows: Sequence[tuple[str, float, Ends]], metric: str, reference: int | None = None) -> Drawing:
    """A metric of several subjects with its 95% intervals, a row each; a line through the reference."""
    mark = None if reference is None else rows[reference][1]
    label = f"{metric_name(metric)} with 95% intervals"

    def said(value: float) -> str:
        return quality(metric, value)

    return _dots(rows, label, said, _form(metric), mark, lambda ends: interval(metric, ends))


@STYLED
def ratios(rows: Sequence[tuple[str, float, Ends]]) -> Drawing:
    """Light over plain, a row each, with quartiles, around the line where both are equal."""
    form = FuncFormatter(lambda value, _: f"{value:g}\u00d7")
    return _dots(rows, "Ratios of the light model to plain PEFT, with quartiles", "{:.2f}".format, form, 1.0)


def _form(metric: str) -> Any:
    return PercentFormatter(1.0) if is_part(metric) else None


def _dots(
    rows: Sequence[tuple[str, float, Ends]],
    label: str,
    said: Callable[[float], str],
    form: Any,
    mark: float | None = None,
    range_said: Callable[[Sequence[float]], str] | None = None,
) -> Drawing:
    """Values with their ranges, a row each, under their names.

    Args:
        rows: (name, value, ends of its range).
        said: a value in words.
        form: of the axis' numbers; None: as they are.
        mark: where a line goes through all rows.
    """
    figure = Drawing(NARROW, 30 + 38 * len(rows), label, "x")
    ends = [end for _, _, ends_of in rows for end in ends_of or ()]
    _check_range([*ends, *(value for _, value, _ in rows), *([] if mark is None else [mark])])
    if mark is not None:
        figure.axes.axvline(mark, color=QUIET, linewidth=1, linestyle="--")
    for row, (name, value, ends_of) in enumerate(rows):
        if ends_of:
            figure.axes.errorbar(value, row, xerr=[[value - ends_of[0]], [ends_of[1] - value]], color=BLUE)
        (dot,) = figure.axes.plot(value, row, "o", color=BLUE)
        told = f" ({range_said(ends_of)})" if range_said and ends_of else ""
        figure.hint(dot, f"{name}: {said(value)}{told}")
        across: dict[str, Any] = {"transform": figure.axes.get_yaxis_transform(), **_SMALL, "parse_math": False}
        figure.axes.text(0, row - 0.3, name, **across)
        figure.axes.text(1, row - 0.3, said(value), ha="right", color=QUIET, **across)
    figure.axes.set_ylim(len(rows) - 0.4, -0.8)
    figure.axes.set_yticks([])
    figure.axes.margins(x=0.06)
    figure.axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    if form is not None:
        figure.axes.xaxis.set_major_formatter(form)
    return figure


# -- what budgets cost ---------------------------------------------------------------------------------------------


@STYLED
def rises(curve: Mapping[str, Any], chosen: float | None) -> Drawing:
    """The rise of the loss before training goes on, by what is gone of the blocks."""
    figure = _budgets("Rise of the loss against the part of the blocks that goes, with 95% intervals", chosen)
    points = [(100 * _gone(point), point["rise"], point["interval"]) for point in curve["points"]]
    figure.axes.plot([100 * curve.get("gone_before", 0.0), *(x for x, _, _ in points)], [0, *(y for _, y, _ in points)])
    figure.axes.lines[-1].set(color=BLUE, linewidth=1.25, alpha=0.6)
    for x, rise, (low, high) in points:
        words = f"{x:.0f}% gone: {rise:+.3f} ({low:+.3f} to {high:+.3f})"
        _point(figure, x, rise, BLUE, words, (low, high))
    return figure


@STYLED
def auto_budget(budget: FoundBudget, measured: float | None) -> Drawing:
    """What was probed of some budgets, what is expected of the one that was found, and what came out."""
    figure = _budgets("Budgets that were probed, with the expected and the measured rise of the loss", None)
    worth, unit = (1.0, "nats") if budget.points_a_nat is None else (budget.points_a_nat, "points")
    figure.axes.axhline(worth * budget.tolerance, color=QUIET, linewidth=1, linestyle="--")
    told = f"tolerance {worth * budget.tolerance:.3g} {unit}"
    at = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    figure.axes.annotate(told, (0, worth * budget.tolerance), (2, 4), **at)  # type: ignore[arg-type]
    for point in budget.probed:
        x, before, after, error = 100 * point.blocks, worth * point.before, worth * point.after, worth * point.error
        _point(figure, x, before, QUIET, f"{x:.0f}% when cut: {before:+.3f} {unit}", name="when cut")
        words = f"{x:.0f}% after a probe: {after:+.3f} {unit}, standard error {error:.3f}"
        _point(figure, x, after, GREEN, words, (after - error, after + error), name="after a probe")
    if budget.expected is not None:
        left, upper = worth * budget.expected.left, worth * budget.expected.upper
        words = f"expected: {left:+.3f} {unit}, at most {upper:+.3f}"
        _point(figure, 100 * budget.blocks, left, BLUE, words, (left, upper), name="expected")
    if measured is not None:
        words = f"measured in the end: {worth * measured:+.3f} {unit}"
        _point(figure, 100 * budget.blocks, worth * measured, ORANGE, words, name="measured")
    figure.axes.set_xlabel("part of the blocks that goes, %", loc="right")
    _legend(figure)
    return figure


def _gone(point: Mapping[str, Any]) -> float:
    return float(point.get("removed_of_blocks") or point["blocks"])


def _budgets(label: str, chosen: float | None) -> Drawing:
    """Axes over what goes of the blocks, in percent, with the run's own budget marked."""
    figure = Drawing(NARROW, 220, label, "both")
    figure.axes.axhline(0, color=RULE, linewidth=0.8)
    figure.axes.set_xlim(left=0)
    figure.axes.autoscale(axis="x")
    figure.axes.set_xlabel("% of the blocks' parameters gone", loc="right")
    if chosen is not None:
        figure.axes.axvline(100 * chosen, color=QUIET, linewidth=1, linestyle="--")
        top: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "right"}
        figure.axes.annotate("this run", (100 * chosen, 1), (-5, -10), **top)
    return figure


def _point(
    figure: Drawing,
    x: float,
    y: float,
    colour: str,
    words: str,
    ends: Ends = None,
    name: str = "",
) -> None:
    """A dot with its range; the first of a name is in the legend."""
    _check_range([y, *(ends or ())])
    if ends is not None:
        figure.axes.errorbar(x, y, yerr=[[max(y - ends[0], 0)], [max(ends[1] - y, 0)]], color=colour)
    known = figure.axes.get_legend_handles_labels()[1]
    (dot,) = figure.axes.plot(x, y, "o", color=colour, label="" if name in known else name)
    figure.hint(dot, words)


def _check_range(values: Iterable[float]) -> None:
    """Refuse what has no room on one axis."""
    found = [*values]
    reach = max(found) - min(found) if found else 0.0
    require(math.isfinite(4 * reach), f"{min(found or [0]):g} and {max(found or [0]):g} cannot be drawn on one axis")
