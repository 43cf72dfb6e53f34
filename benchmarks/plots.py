"""Plots of the benchmarks: color-blind-safe (Okabe and Ito), every series told apart by its marker as well."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox

STYLES: dict[str, dict[str, str]] = {
    "plain": {"color": "#0072B2", "marker": "o"},
    "pruned": {"color": "#E69F00", "marker": "s"},
    "light": {"color": "#D55E00", "marker": "D"},
}
"""Kind of method -> color and marker."""
KINDS = {"plain": "dense model", "pruned": "pruned before training", "light": "lightpeft"}
TEXT_COLORS = {"plain": "#00548A", "pruned": "#8A5F00", "light": "#A84A00"}
"""The same colors, dark enough for small letters on white."""
_PHONE = 4.7
"""Inches."""
_LETTERS = 10
"""Points."""
_RADII = (9, 14, 20, 28, 38, 50, 64, 80, 98, 118, 140)
_DIRECTIONS = 16


@dataclass(frozen=True)
class Point:
    """One method in one panel."""

    label: str
    kind: str
    x: float
    y: float
    x_range: tuple[float, float]
    """Ends of the horizontal bar."""
    y_range: tuple[float, float]
    """Ends of the vertical bar."""


@dataclass(frozen=True)
class Panel:
    """One scatter plot."""

    title: str
    x_label: str
    y_label: str
    points: Sequence[Point]


def scatter(panels: Sequence[Panel], title: str) -> Figure:
    """The panels one below the other, every point with its spread and its name beside it.

    As narrow as a phone in print (a point is a pixel of its screen, about), so that letters are large enough there.
    """
    heights = [2.4 + 0.15 * len(panel.points) for panel in panels]
    figure = Figure(figsize=(_PHONE, 0.7 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=_LETTERS)
    grid: Any = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        _draw(axes, panel)
    kinds = [kind for kind in KINDS if any(point.kind == kind for panel in panels for point in panel.points)]
    handles = [grid[0].plot([], [], linestyle="none", label=KINDS[kind], **STYLES[kind])[0] for kind in kinds]
    close = {"handletextpad": 0.2, "columnspacing": 1.0}
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=_LETTERS, **close)
    figure.canvas.draw()
    for axes, panel in zip(grid, panels, strict=True):
        label_points(axes, panel.points)
    return figure


def _draw(axes: Axes, panel: Panel) -> None:
    axes.set_xlabel(panel.x_label, fontsize=_LETTERS)
    axes.set_ylabel(panel.y_label, fontsize=_LETTERS)
    axes.set_title(panel.title, fontsize=_LETTERS + 1)
    axes.tick_params(labelsize=_LETTERS)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for point in panel.points:
        bars = [[[v - low], [high - v]] for v, (low, high) in ((point.x, point.x_range), (point.y, point.y_range))]
        style: dict[str, Any] = {"linestyle": "none", "elinewidth": 1, "capsize": 2, **STYLES[point.kind]}
        axes.errorbar(point.x, point.y, xerr=bars[0], yerr=bars[1], **style)
    axes.margins(0.16, 0.2)


def label_points(axes: Axes, points: Sequence[Point], obstacles: Sequence[Bbox] = ()) -> list[Bbox]:
    """Write every point's name near it, where no other name, marker, bar or obstacle is; returns their boxes in pixels.

    A name that ends up far away gets a line to its point.
    """
    scale = _renderer(axes).points_to_pixels(1)
    taken = [*obstacles, *(box for point in points for box in _obstacles(axes, point, 5 * scale))]
    placed = []
    for point in sorted(points, key=lambda point: (point.x, point.y)):
        color = TEXT_COLORS[point.kind]
        _, box, radius = _write(axes, point.label, (point.x, point.y), taken, fontsize=_LETTERS, color=color)
        if radius > _RADII[0]:
            home = axes.transData.transform((point.x, point.y))
            end: Any = axes.transData.inverted().transform(_nearest(box, home))
            line = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
            axes.annotate("", (point.x, point.y), xytext=end, arrowprops=line)
        taken.append(box.padded(2 * scale))
        placed.append(box)
    return placed


def _write(
    axes: Axes, label: str, place: tuple[float, float], taken: Sequence[Bbox], **style: Any
) -> tuple[Annotation, Bbox, float]:
    """Write a label at the nearest free place around a point: returns it, its box in pixels, and the radius in points.

    Places are tried from near to far in all directions.
    """
    renderer = _renderer(axes)
    scale, home = renderer.points_to_pixels(1), axes.transData.transform(place)
    text = axes.annotate(label, place, xytext=(0, 0), textcoords="offset points", ha="center", va="center", **style)
    size = text.get_window_extent(renderer)
    offset, radius = _free_place(home, size, scale, taken, axes.get_window_extent(renderer))
    text.set_position(offset)
    return text, _box(home, size, offset, scale), radius


def _renderer(axes: Axes) -> Any:
    return axes.get_figure(root=True).canvas.get_renderer()  # type: ignore[union-attr]


def _obstacles(axes: Axes, point: Point, radius: float) -> Iterator[Bbox]:
    """The boxes of a point's marker and of its two bars, in pixels."""
    x, y = axes.transData.transform((point.x, point.y))
    yield Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)
    for start, end in (
        ((point.x_range[0], point.y), (point.x_range[1], point.y)),
        ((point.x, point.y_range[0]), (point.x, point.y_range[1])),
    ):
        (left, low), (right, high) = axes.transData.transform((start, end))
        yield Bbox.from_extents(left - 2, low - 2, right + 2, high + 2)


def _free_place(
    home: Any, size: Bbox, scale: float, taken: Sequence[Bbox], inside: Bbox
) -> tuple[tuple[float, float], float]:
    """The nearest offset in points at which the box hits nothing; where there is none, that with the fewest hits."""
    best, fewest = ((0.0, 0.0), 0.0), math.inf
    for radius, turn in itertools.product(_RADII, range(_DIRECTIONS)):
        angle = 2 * math.pi * turn / _DIRECTIONS
        # the box touches the circle with its nearer edge
        offset = (
            math.cos(angle) * (radius + size.width / scale / 2),
            math.sin(angle) * (radius + size.height / scale / 2),
        )
        box = _box(home, size, offset, scale)
        outside = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
        hits = sum(box.overlaps(other) for other in taken) + (100 if outside else 0)
        if hits < fewest:
            best, fewest = (offset, radius), hits
        if not hits:
            break
    return best


def _box(home: Any, size: Bbox, offset: tuple[float, float], scale: float) -> Bbox:
    x, y = home[0] + offset[0] * scale, home[1] + offset[1] * scale
    return Bbox.from_extents(x - size.width / 2, y - size.height / 2, x + size.width / 2, y + size.height / 2)


def _nearest(box: Bbox, home: Any) -> tuple[float, float]:
    """The point of the box that is nearest to `home`."""
    return min(max(home[0], box.x0), box.x1), min(max(home[1], box.y0), box.y1)


LINES: dict[str, dict[str, Any]] = {
    "plain": {"color": "#0072B2", "marker": "o"},
    "light": {"color": "#D55E00", "marker": "D"},
}
"""Series -> how its line looks."""


@dataclass(frozen=True)
class CostPanel:
    """Costs of budgets for one model on one task, and budgets that a search found."""

    title: str
    y_label: str
    tried: Mapping[float, Sequence[float]]
    """Budget -> what it costs, one value a seed."""
    found: Sequence[tuple[float, float]]
    """Budgets that were found, and what they cost."""
    tolerance: float
    """The largest cost that is allowed."""


def costs(panels: Sequence[CostPanel], columns: int = 3) -> Figure:
    """A plot for each, `columns` beside one another: means with standard errors, what was found, and the tolerance."""
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.6 * min(columns, len(panels)), 2.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(rows, min(columns, len(panels)), squeeze=False)
    for axes, panel in zip_longest(grid.flat, panels):
        if panel is None:
            axes.set_axis_off()
        else:
            _draw_costs(axes, panel)
    marks = grid.flat[0].get_legend_handles_labels()
    figure.legend(*marks, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def _draw_costs(axes: Axes, panel: CostPanel) -> None:
    tried = sorted(panel.tried.items())
    percent = [100 * blocks for blocks, _ in tried]
    means = [statistics.fmean(values) for _, values in tried]
    errors = [statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0 for _, values in tried]
    axes.axhline(panel.tolerance, color="#555555", linestyle="--", linewidth=1, label="may be lost")
    axes.errorbar(percent, means, errors, capsize=2, markersize=4, linewidth=1.4, label="tried, mean", **LINES["plain"])
    xs, ys = [100 * blocks for blocks, _ in panel.found], [cost for _, cost in panel.found]
    axes.scatter(xs, ys, s=28, zorder=3, label="found, seed by seed", color=LINES["light"]["color"], marker="D")
    axes.set_title(panel.title, fontsize=9)
    axes.set_xlabel("of the blocks removed, %", fontsize=8)
    axes.set_ylabel(panel.y_label, fontsize=8)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlim(-4, 84)
    axes.tick_params(labelsize=8)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


@dataclass(frozen=True)
class FrontierPanel:
    """Quality against latency."""

    title: str
    y_label: str
    marks: Sequence[Point]
    """Whole models, with their names."""
    lines: Mapping[tuple[str, str], Sequence[tuple[float, float, str]]]
    """Model and way of training -> milliseconds, quality, and what is written beside it."""


_CUTS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Colors of the ways of training."""
_DARK = 0.65
"""Factor on a color for small letters on white."""
_MARKERS = "Dsv^PX"
"""Of the models."""


def frontier(panels: Sequence[FrontierPanel], x_label: str, columns: int = 1) -> Figure:
    """The panels, `columns` beside one another, latency on a scale of factors."""
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(_PHONE * columns, 1.3 + 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    models, kinds = (list(dict.fromkeys(way[part] for panel in panels for way in panel.lines)) for part in (0, 1))
    colors = dict(zip(kinds, itertools.cycle(_CUTS), strict=False))
    markers = dict(zip(models, itertools.cycle(_MARKERS), strict=False))
    drawn = [*zip(grid.flat, panels, strict=False)]
    for axes, panel in drawn:
        _draw(axes, Panel(panel.title, x_label, panel.y_label, panel.marks))
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        for (model, kind), line in panel.lines.items():
            style: dict[str, Any] = {"color": colors[kind], "marker": markers[model], "markersize": 4}
            axes.plot(*zip(*(point[:2] for point in line), strict=True), **style)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    handles = [Line2D([], [], color=color, label=kind) for kind, color in colors.items()]
    handles += [
        Line2D([], [], color="#555555", marker=marker, linestyle="", label=model) for model, marker in markers.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=_LETTERS - 1)
    figure.canvas.draw()
    for axes, panel in drawn:
        cuts = _label_cuts(axes, panel, colors)
        label_points(axes, panel.marks, [*_along(axes, panel.lines.values()), *cuts])
    return figure


def _label_cuts(axes: Axes, panel: FrontierPanel, colors: Mapping[str, str]) -> list[Bbox]:
    """Write beside the points of lines what belongs there, in the dark color of the line; returns boxes in pixels.

    Without a free place near a point, nothing is written.
    """
    scale = _renderer(axes).points_to_pixels(1)
    taken = [*_along(axes, panel.lines.values())]
    taken += [box for point in panel.marks for box in _obstacles(axes, point, 5 * scale)]
    placed: list[Bbox] = []
    for (_, kind), line in panel.lines.items():
        style = {"fontsize": _LETTERS - 2, "color": [_DARK * part for part in to_rgb(colors[kind])]}
        for x, y, label in line:
            text, box, radius = _write(axes, label, (x, y), [*taken, *placed], **style)
            text.set_visible(radius <= _RADII[1])
            placed += [box] if text.get_visible() and label else []
    return placed


def _along(axes: Axes, lines: Iterable[Sequence[tuple[float, float, str]]]) -> Iterator[Bbox]:
    """Boxes in pixels, one after another, that cover lines and the marks of their points."""
    for line in lines:
        ends = axes.transData.transform([point[:2] for point in line])
        for start, end in itertools.pairwise([*ends, ends[-1]]):
            for part in range(21):
                x, y = start + (end - start) * part / 20
                yield Bbox.from_extents(x - 4, y - 4, x + 4, y + 4)


@dataclass(frozen=True)
class SizePanel:
    """Costs of cuts against the size of the model."""

    title: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float, float, float]]]
    """Budget -> parameters, cost, and the ends of its bar."""
    extrapolated: Mapping[str, Sequence[tuple[float, float]]]
    """Budget -> parameters and cost beyond the largest model."""
    claimed: bool
    """Whether the paper's claim, that 40% cost nothing from 1.3 billion parameters on, is about these costs."""


_APART = 1.03
"""Factor between the places of two budgets of one size."""


def sizes(panels: Sequence[SizePanel], largest: float) -> Figure:
    """The panels one below the other, sizes on a scale of factors."""
    figure = Figure(figsize=(_PHONE, 0.9 + 2.9 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    drawn = {}
    for axes, panel in zip(grid, panels, strict=True):
        _draw(axes, Panel(panel.title, "parameters of the model", panel.y_label, []))
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e9:g}B")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(1e8, 1.15 * largest)
        if panel.claimed:
            claim = axes.plot([1.3e9, largest], [0, 0], color="#000000", linewidth=2.5)[0]
            drawn["paper, 40%"] = claim
        for name, points in panel.lines.items():
            place = names.index(name)
            parameters, y, low, high = zip(*points, strict=True)
            x = [each * _APART**place for each in parameters]  # so that bars of different budgets stay apart
            bars = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
            style: dict[str, Any] = {"color": _CUTS[place % 6], "markersize": 5}
            marked = {"marker": "DsvP^X"[place % 6], "capsize": 2, "elinewidth": 1, "label": name, **style}
            drawn[name] = axes.errorbar(x, y, bars, **marked)
            if name in panel.extrapolated:
                dotted = axes.plot(*zip(*panel.extrapolated[name], strict=True), linestyle=":", **style)[0]
                drawn.setdefault("extrapolated", dotted)
    labels = sorted(drawn, key=lambda name: (not name[0].isdigit(), name))
    handles = [drawn[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=_LETTERS)
    return figure


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write <stem>.png and <stem>.svg."""
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths
