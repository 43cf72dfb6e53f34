"""The page's figures: facts in, drawings out. Each fits a phone, or is drawn for a width that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest

from lightpeft.app.runs.report.facts import AutoBudget, Curve, Losses
from lightpeft.app.runs.report.svg import Drawing, Point, Scale, tick_text
from lightpeft.app.runs.report.words import count, interval, is_part, metric_name, quality
from lightpeft.plans.records import BlockPlan, PrunePlan
from lightpeft.plans.structure import SITE_SLOTS, BlockSpec

NARROW = 326.0
"""Pixels that the smallest screens have room for."""
COLOURS = {"estimate": "orange", "train": "blue", "widen": "green"}
"""Stage that trains -> the class of what belongs to it."""
_LINE = 15.0
"""Height of a line of small text."""


def colour(stage: str) -> str:
    """The class of what belongs to a stage."""
    return COLOURS.get(stage, "muted-dot")


# -- what stays ----------------------------------------------------------------------------------------------------


class _Layers:
    """Rows for the blocks of a plan, the lowest block at the bottom, with names on the left."""

    def __init__(self, plan: PrunePlan, right: float) -> None:
        """
        Args:
            right: pixels on the right that are for numbers.
        """
        self.parts: list[tuple[BlockSpec, BlockPlan | None]] = list(zip_longest(plan.specs, plan.blocks))
        self.pitch = max(7.0, min(22.0, 620.0 / len(self.parts)))
        self.thick = self.pitch - (4 if self.pitch >= 14 else 2)
        names = [spec.label or str(spec.index) for spec in plan.specs]
        self.left = 10 + 6.6 * max(map(len, names))
        self.inner = NARROW - self.left - right
        self.height = _LINE + self.pitch * len(self.parts)
        self.names = names

    def drawing(self, label: str) -> Drawing:
        """An empty figure with the names of the blocks; of many blocks, of some."""
        figure = Drawing(NARROW, self.height, label)
        each = max(1, round(13 / self.pitch))
        for index, name in enumerate(self.names):
            if index % each == 0:
                figure.text((self.left - 8, self.base(index)), name, "small muted", "end")
        return figure

    def top(self, index: int) -> float:
        """Pixel of the upper edge of a block's row."""
        return _LINE + self.pitch * (len(self.parts) - 1 - index) + (self.pitch - self.thick) / 2

    def base(self, index: int) -> float:
        """Pixel of the base line of text in the middle of it."""
        return self.top(index) + self.thick / 2 + 4

    def number(self, figure: Drawing, index: int, words: str, end: float = NARROW) -> None:
        """What stays, at the right end of a row, where there is room for it."""
        if self.pitch >= 11:
            figure.text((end, self.base(index)), words, "small muted", "end")

    def left_out(self, figure: Drawing, index: int, width: float | None = None) -> None:
        """A row of a block that is gone whole."""
        middle, end = self.top(index) + self.thick / 2, self.left + (width or self.inner)
        figure.line((self.left, middle), (end, middle), "gone-line", "left out whole")


def heads(plan: PrunePlan) -> Drawing:
    """Every query head of every block, those that stay filled; heads that share keys and values stand together."""
    most = max(spec.heads for spec in plan.specs)
    digits = 14 + 6.8 * (2 * len(str(most)))
    rows = _Layers(plan, right=digits)
    pitch = min(20.0, rows.inner / most)
    end = rows.left + pitch * most + digits
    kept_in_all = sum(len(block.heads) for block in plan.blocks)
    of = sum(spec.heads for spec in plan.specs)
    figure = rows.drawing(f"Attention heads that stay, layer by layer: {kept_in_all} of {of}")
    for index, (spec, kept) in enumerate(rows.parts):
        if kept is None:
            rows.left_out(figure, index, pitch * most)
            rows.number(figure, index, f"0/{spec.heads}", end)
            continue
        gap = 0.0 if pitch < 6 else 1.5
        grouped = spec.heads_per_kv > 1 and pitch >= 6
        width = pitch - gap - (0.5 if grouped else 0)

        def place(head: int, of: BlockSpec = spec, at: int = index, grouped: bool = grouped) -> Point:
            within = head % of.heads_per_kv if grouped else 0
            return rows.left + pitch * head - 0.75 * within, rows.top(at)

        stay = set(kept.heads)
        gone = [place(head) for head in range(spec.heads) if head not in stay]
        words = f"layer {rows.names[index]}: {len(stay)} of {spec.heads} heads stay"
        figure.cells(gone, width, rows.thick, "gone", words)
        figure.cells([place(head) for head in kept.heads], width, rows.thick, "blue", words)
        rows.number(figure, index, f"{len(stay)}/{spec.heads}", end)
    return figure


def neurons(plan: PrunePlan) -> Drawing:
    """How many of a block's FFN neurons stay."""
    return _widths(plan, "FFN neurons", lambda spec: spec.neurons, lambda kept: len(kept.neurons))


def experts(plan: PrunePlan) -> Drawing:
    """How many of a block's routed experts stay."""
    return _widths(plan, "experts", lambda spec: spec.experts, lambda kept: len(kept.experts))


def expert_neurons(plan: PrunePlan) -> Drawing:
    """How many neurons stay of each expert that stays."""
    return _widths(plan, "neurons of each expert", lambda spec: spec.expert_width, lambda kept: kept.expert_width)


def _widths(
    plan: PrunePlan, what: str, dense: Callable[[BlockSpec], int], stays: Callable[[BlockPlan], int]
) -> Drawing:
    """How many of some units of a block stay, as bars."""
    most = max(map(dense, plan.specs))
    rows = _Layers(plan, right=14 + 7.2 * (2 * len(str(most))))
    kept_in_all, of = sum(map(stays, plan.blocks)), sum(map(dense, plan.specs))
    figure = rows.drawing(f"{what[0].upper()}{what[1:]} that stay, layer by layer: {count(kept_in_all)} of {count(of)}")
    for index, (spec, kept) in enumerate(rows.parts):
        if kept is None:
            rows.left_out(figure, index)
        elif dense(spec):
            words = f"layer {rows.names[index]}: {stays(kept):,} of {dense(spec):,} {what.removeprefix('FFN ')} stay"
            full = rows.inner * dense(spec) / most
            figure.rect(rows.left, rows.top(index), full, rows.thick, "gone", words)
            figure.rect(rows.left, rows.top(index), full * stays(kept) / dense(spec), rows.thick, "blue", words)
        rows.number(figure, index, f"{stays(kept) if kept else 0}/{dense(spec)}" if dense(spec) else "none")
    return figure


def modules(plan: PrunePlan) -> Drawing:
    """Every PEFT module, a column for each place in a block: how many of its ranks stay."""
    dense = {(site.block, site.slot): site.rank for site in plan.dense_sites}
    slots = [slot for slot in SITE_SLOTS if any(slot == of for _, of in dense)]
    rows = _Layers(plan, right=0)
    figure = rows.drawing(f"PEFT modules that stay, with their ranks: {len(plan.sites)} of {len(plan.dense_sites)}")
    pitch = min(58.0, rows.inner / max(len(slots), 1))
    for column, slot in enumerate(slots):
        figure.text((rows.left + pitch * (column + 0.5) - 1.5, _LINE - 6), _short(slot, pitch), "small muted", "middle")
    for index, (spec, kept) in enumerate(rows.parts):
        if kept is None:
            rows.left_out(figure, index)
        for slot, stay in plan.module_ranks(spec).items():
            left, top, ranks = rows.left + pitch * slots.index(slot), rows.top(index), dense[spec.index, slot]
            words = f"layer {rows.names[index]}, {slot}: {stay} of {ranks} ranks stay"
            figure.rect(left, top, pitch - 3, rows.thick, "gone", words)
            figure.rect(left, top, (pitch - 3) * stay / ranks, rows.thick, "blue soft", words)
            if stay and rows.pitch >= 14:
                figure.text((left + (pitch - 3) / 2, rows.base(index)), str(stay), "small", "middle")
    return figure


def _short(slot: str, width: float) -> str:
    """A slot's name in so many pixels."""
    prefix = "ffn " if width >= 46 else ""
    return {"ffn_in": f"{prefix}in", "ffn_gate": "gate", "ffn_gate_in": "gate+in", "ffn_out": f"{prefix}out"}.get(
        slot, slot
    )


# -- losses --------------------------------------------------------------------------------------------------------


def losses(lines: Sequence[Losses], cut: int | None, mark: str, width: float) -> Drawing:
    """The training loss of all stages over the steps of the run, with a mark where it was cut."""
    height = 240.0 if width > 500 else 210.0
    points = [point for line in lines for point in line.points]
    figure = Drawing(width, height, "Training loss by optimizer step, stage by stage")
    across = Scale(0, max(max(x for x, _ in points), 1), 44, width - 12)
    upwards = Scale.around([y for _, y in points], height - 34, 26)
    _grid(figure, upwards, across, "optimizer step", width)
    if cut is not None:
        at = across(cut)
        figure.line((at, 20), (at, height - 34), "mark")
        side = "end" if at > 0.75 * width else "start"
        figure.text((at + (-5 if side == "end" else 5), height - 40), f"{mark}, step {cut:,}", "small", side)
    named = 44.0
    for line in lines:
        shade = colour(line.stage)
        pixels = [(across(x), upwards(y)) for x, y in line.points]
        figure.polyline(pixels, f"{shade}-line")
        for (x, y), at_pixel in zip(line.points, pixels, strict=True):
            figure.dot(at_pixel, 1.8, shade, f"{line.title}, step {x:,.0f}: loss {y:.4f}")
        figure.dot((named + 4, 9), 4, shade)
        figure.text((named + 13, 13), line.title, "small")
        named += 32 + 6.4 * len(line.title)
    return figure


def _grid(figure: Drawing, upwards: Scale, across: Scale, below: str, width: float) -> None:
    """Lines and numbers of both axes; the name of the lower one."""
    ticks = upwards.ticks(6)
    for tick in ticks:
        y = upwards(tick)
        figure.line((across.start, y), (across.end, y), "grid")
        figure.text((across.start - 6, y + 4), tick_text(tick, ticks), "small muted", "end")
    places = across.ticks(9 if width > 500 else 5)
    for tick in places:
        figure.text((across(tick), upwards.start + 14), tick_text(tick, places), "small muted", "middle")
    figure.text((across.end, figure.height - 3), below, "small muted", "end")


# -- values in rows ------------------------------------------------------------------------------------------------


def course(moments: dict[str, dict[str, float]], metric: str) -> Drawing:
    """One metric at the milestones of a run, a row each."""
    found = [(name, values[metric]) for name, values in moments.items() if metric in values]
    left, right = 116.0, NARROW - 54
    figure = Drawing(NARROW, 24 + 24 * len(found), f"{metric_name(metric)} at the milestones of the run")
    scale = Scale.around([value for _, value in found], left + 6, right - 6)
    figure.text((left, 12), metric_name(metric), "small strong")
    places = [(scale(value), 34.0 + 24 * row) for row, (_, value) in enumerate(found)]
    own = [place for (name, _), place in zip(found, places, strict=True) if name != "constant_answer"]
    for _, y in places:
        figure.line((left, y), (right, y), "grid")
    figure.polyline(own, "blue-line thin")
    for (name, value), (x, y) in zip(found, places, strict=True):
        figure.text((0, y + 4), metric_name(name), "small")
        constant = name == "constant_answer"
        figure.dot((x, y), 4.5, "hollow" if constant else "blue", f"{metric_name(name)}: {quality(metric, value)}")
        figure.text((NARROW, y + 4), quality(metric, value), "small", "end")
    return figure


def intervals(
    rows: Sequence[tuple[str, float, tuple[float, float] | None]], metric: str, reference: int | None = None
) -> Drawing:
    """A metric of several subjects with its 95% intervals, a row each; a line through the reference."""
    left, right = 12.0, NARROW - 12
    figure = Drawing(NARROW, 20 + 44 * len(rows), f"{metric_name(metric)} with 95% intervals")
    ends = [end for _, value, ends in rows for end in (value, *(ends or ()))]
    scale = Scale.around(ends, left, right)
    bottom = 40 * len(rows) + 4.0
    ticks = scale.ticks(5)
    for tick in ticks:
        figure.line((scale(tick), 2), (scale(tick), bottom), "grid")
        shown = tick_text(100 * tick, [100 * each for each in ticks]) + "%" if is_part(metric) else None
        figure.text((scale(tick), bottom + 13), shown or tick_text(tick, ticks), "small muted", "middle")
    if reference is not None:
        at = scale(rows[reference][1])
        figure.line((at, 2), (at, bottom), "mark")
    for row, (name, value, ends_of) in enumerate(rows):
        y = 29.0 + 40 * row
        figure.text((left, y - 11), name, "small halo")
        shade = "muted" if row == reference else "blue"
        told = f"{name}: {quality(metric, value)} ({interval(metric, ends_of)})" if ends_of else name
        if ends_of:
            _whisker(figure, (scale(ends_of[0]), y), (scale(ends_of[1]), y), f"{shade}-line", told)
        figure.dot((scale(value), y), 4.5, f"{shade}-dot", told)
    return figure


def _whisker(figure: Drawing, start: Point, end: Point, style: str, hint: str = "") -> None:
    """A range, with short strokes across its ends."""
    across = (0.0, 4.0) if start[1] == end[1] else (4.0, 0.0)
    figure.line(start, end, style, hint)
    for x, y in (start, end):
        figure.line((x - across[0], y - across[1]), (x + across[0], y + across[1]), style)


def bars(
    rows: Sequence[tuple[str, Sequence[tuple[str, float]], str]], label: str, hint: Callable[[float], str]
) -> Drawing:
    """Sums of parts as bars from 0, a row each, with its name above and its value at the right.

    Args:
        rows: (name, parts as (class of colour, value), words for the whole).
        label: what the figure shows.
        hint: a value in words.
    """
    figure = Drawing(NARROW, 38.0 * len(rows), label)
    most = max((sum(value for _, value in parts) for _, parts, _ in rows), default=0.0) or 1.0
    for row, (name, parts, words) in enumerate(rows):
        top, at = 38.0 * row, 0.0
        figure.text((0, top + 11), name, "small")
        figure.text((NARROW, top + 11), words, "small", "end")
        figure.rect(0, top + 16, NARROW, 12, "track")
        for shade, value in parts:
            figure.rect(at, top + 16, NARROW * value / most, 12, shade, f"{name}: {hint(value)}")
            at += NARROW * value / most
    return figure


def share_bar(part: float) -> Drawing:
    """What of a whole is left, as a small bar for a table."""
    figure = Drawing(96, 10, f"{100 * part:.0f}% are left")
    figure.rect(0, 0, 96, 10, "gone")
    figure.rect(0, 0, 96 * min(max(part, 0.0), 1.0), 10, "blue")
    return figure


def ratios(rows: Sequence[tuple[str, float, tuple[float, float] | None]]) -> Drawing:
    """Light over plain, a row each, with quartiles, around the line where both are equal."""
    left, right = 12.0, NARROW - 12
    figure = Drawing(NARROW, 24 + 38 * len(rows), "Ratios of the light model to plain PEFT, with quartiles")
    scale = Scale.around([1.0, *(end for _, value, ends in rows for end in (value, *(ends or ())))], left, right)
    bottom = 38.0 * len(rows) + 4
    ticks = scale.ticks(5)
    for tick in ticks:
        figure.line((scale(tick), 2), (scale(tick), bottom), "grid")
        figure.text((scale(tick), bottom + 13), tick_text(tick, ticks) + "\u00d7", "small muted", "middle")
    figure.line((scale(1), 2), (scale(1), bottom), "mark")
    for row, (name, value, ends) in enumerate(rows):
        y = 28.0 + 38 * row
        figure.text((left, y - 11), name, "small halo")
        if ends:
            _whisker(figure, (scale(ends[0]), y), (scale(ends[1]), y), "blue-line")
        figure.dot((scale(value), y), 4.5, "blue", f"{name}: {value:.2f}")
    return figure


# -- what budgets cost ---------------------------------------------------------------------------------------------


def rises(curve: Curve, chosen: float | None, width: float = NARROW) -> Drawing:
    """The rise of the loss before training goes on, by what is gone of the blocks."""
    found = [(point.removed_of_blocks or point.blocks, point.rise, point.interval) for point in curve.points]
    figure = Drawing(width, 214, "Rise of the loss against the part of the blocks that goes, with 95% intervals")
    heights = [0.0, *(end for _, rise, ends in found for end in (rise, *ends))]
    across, upwards = _budgets(figure, [curve.gone_before, *(x for x, _, _ in found)], heights, chosen)
    start = (across(100 * curve.gone_before), upwards(0))
    figure.polyline([start, *((across(100 * x), upwards(rise)) for x, rise, _ in found)], "blue-line thin")
    figure.dot(start, 3, "blue")
    for x, rise, (low, high) in found:
        at = across(100 * x)
        words = f"{100 * x:.0f}% gone: {rise:+.3f} ({low:+.3f} to {high:+.3f})"
        _whisker(figure, (at, upwards(low)), (at, upwards(high)), "blue-line", words)
        figure.dot((at, upwards(rise)), 3.5, "blue", words)
    return figure


def step_times(curve: Curve, chosen: float | None, width: float = NARROW) -> Drawing:
    """The time of a training step by what is gone, of that with nothing cut: measured ones filled."""
    found = [(p.removed_of_blocks or p.blocks, p.step_time, p.blocks) for p in curve.points if p.step_time is not None]
    figure = Drawing(width, 214, "Time of a training step against the part of the blocks that goes")
    heights = [0.0, 1.0, *(time for _, time, _ in found)]
    across, upwards = _budgets(figure, [curve.gone_before, *(x for x, _, _ in found)], heights, chosen)
    start = (across(100 * curve.gone_before), upwards(1))
    figure.polyline([start, *((across(100 * x), upwards(time)) for x, time, _ in found)], "orange-line thin")
    figure.dot(start, 3.5, "orange")
    for x, time, blocks in found:
        measured = f"{blocks:g}" in curve.step_times
        words = f"{100 * x:.0f}% gone: {time:.2f} of the whole model's time" + (
            "" if measured else ", read off the line"
        )
        figure.dot((across(100 * x), upwards(time)), 3.5, "orange" if measured else "orange-hollow", words)
    return figure


def _budgets(
    figure: Drawing, places: Sequence[float], heights: Sequence[float], chosen: float | None
) -> tuple[Scale, Scale]:
    """Axes over what goes of the blocks, in percent, with the run's own budget marked."""
    across = Scale(0, max(100 * max(places), 10.0) * 1.04, 44, figure.width - 12)
    upwards = Scale.around(heights, figure.height - 34, 12, zero=True)
    _grid(figure, upwards, across, "% of the blocks' parameters gone", figure.width)
    if chosen is not None and 100 * chosen <= across.high:
        at = across(100 * chosen)
        figure.line((at, 8), (at, upwards.start), "mark")
        figure.text((at - 5, 14), "this run", "small halo", "end")
    return across, upwards


def _in_its_unit(budget: AutoBudget, measured: float | None) -> tuple[AutoBudget, float | None, str]:
    """Costs as the tolerance has them: in nats of the loss, or in the points that these are worth."""
    worth = budget.points_a_nat
    if worth is None:
        return budget, measured, "nats"
    probed = [
        replace(each, before=worth * each.before, after=worth * each.after, error=worth * each.error)
        for each in budget.probed
    ]
    of = budget.expected
    expected = None if of is None else replace(of, left=worth * of.left, upper=worth * of.upper)
    budget = replace(budget, tolerance=worth * budget.tolerance, probed=probed, expected=expected)
    return budget, None if measured is None else worth * measured, "points"


def auto_budget(budget: AutoBudget, measured: float | None, width: float = NARROW) -> Drawing:
    """What was probed of some budgets, what is expected of the one that was found, and what came out."""
    figure = Drawing(width, 232, "Budgets that were probed, with the expected and the measured rise of the loss")
    budget, measured, unit = _in_its_unit(budget, measured)
    expected = budget.expected
    heights = [0.0, budget.tolerance, *(end for p in budget.probed for end in (p.before, p.after - p.error))]
    heights += [expected.left, expected.upper] if expected else []
    heights += [] if measured is None else [measured]
    across = Scale(0, max(100 * max([budget.blocks, *(p.blocks for p in budget.probed)]) * 1.08, 10.0), 44, width - 12)
    upwards = Scale.around(heights, figure.height - 34, 26, zero=True)
    _grid(figure, upwards, across, "light.blocks, %", width)
    figure.line((44, upwards(budget.tolerance)), (width - 12, upwards(budget.tolerance)), "mark")
    figure.text((48, upwards(budget.tolerance) - 5), f"tolerance {budget.tolerance:.3g} {unit}", "small halo")
    for point in budget.probed:
        at, words = across(100 * point.blocks), f"{100 * point.blocks:.0f}% when cut: {point.before:+.3f} {unit}"
        figure.dot((at, upwards(point.before)), 3, "muted-dot", words)
        words = f"{100 * point.blocks:.0f}% after a probe: {point.after:+.3f} {unit}, standard error {point.error:.3f}"
        ends = (at, upwards(point.after - point.error)), (at, upwards(point.after + point.error))
        _whisker(figure, *ends, "muted-line", words)
        figure.dot((at, upwards(point.after)), 4, "green", words)
    at = across(100 * budget.blocks)
    if expected is not None:
        words = f"expected: {expected.left:+.3f} {unit}, at most {expected.upper:+.3f}"
        _whisker(figure, (at, upwards(expected.left)), (at, upwards(expected.upper)), "blue-line", words)
        figure.dot((at, upwards(expected.left)), 4.5, "blue", words)
    if measured is not None:
        figure.dot((at, upwards(measured)), 4.5, "orange", f"measured in the end: {measured:+.3f} {unit}")
    named = 44.0
    for shade, words in (
        ("muted-dot", "when cut"),
        ("green", "after a probe"),
        ("blue", "expected"),
        ("orange", "measured"),
    ):
        if shade != "orange" or measured is not None:
            figure.dot((named + 4, 9), 4, shade)
            figure.text((named + 13, 13), words, "small")
            named += 26 + 6.0 * len(words)
    return figure
