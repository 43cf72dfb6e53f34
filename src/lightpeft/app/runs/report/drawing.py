"""A matplotlib figure as inline SVG: with the page's colors, and without ids that could clash in one page."""

from __future__ import annotations

import copy
import io
import re
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, QUIET, RULE, BLANK = "#1c1e21", "#62676e", "#dcdcd7", "#e6e6e1"
BLUE, ORANGE, GREEN, PAPER = "#0072b2", "#d55e00", "#009e73", "#fdfdfc"
_NAMES = {INK: "ink", QUIET: "quiet", RULE: "rule", BLANK: "blank"}
_NAMES |= {BLUE: "blue", ORANGE: "orange", GREEN: "green", PAPER: "paper"}
"""Color -> variable of the page's style sheet that replaces it; dark mode has other values."""
STYLED = rc_context(
    {
        "font.size": 12,
        "text.color": INK,
        "axes.edgecolor": RULE,
        "axes.labelcolor": QUIET,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.useoffset": False,
        "grid.color": RULE,
        "lines.linewidth": 1.75,
        "errorbar.capsize": 3,
        "legend.frameon": False,
        "xtick.labelcolor": QUIET,
        "ytick.labelcolor": QUIET,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "svg.fonttype": "none",
        "svg.hashsalt": "lightpeft",
    }
)
"""Decorator of functions that draw, which sets the style."""


class Drawing:
    """One figure with one pair of axes, in pixels."""

    def __init__(self, width: float, height: float, label: str, grid: str = "") -> None:
        """
        Args:
            label: description of the figure for screen readers.
            grid: axes with grid lines: "x", "y" or "both"; empty: none.
        """
        self.width, self.height, self.label = width, height, label
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        self.figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)  # type: ignore[union-attr, call-arg]
        FigureCanvasSVG(self.figure)
        self.axes: Axes = self.figure.subplots()
        if grid:
            self.axes.grid(axis=grid)  # type: ignore[arg-type]
        for side in self.axes.spines.values():
            side.set_visible(False)

    @STYLED
    def __html__(self) -> str:
        """Return the SVG, which the template inserts without escaping."""
        file = io.StringIO()
        self.figure.savefig(file, format="svg", transparent=True)
        drawn = ElementTree.fromstring(file.getvalue())
        for element in drawn.iter():
            element.tag = element.tag.rpartition("}")[2]
            element.attrib = {
                name.rpartition("}")[2]: _clean_attribute(value) for name, value in element.attrib.items()
            }
        shapes = {each.attrib["id"]: each for each in drawn.iter() if "id" in each.attrib}
        figure = shapes["figure_1"]
        for parent in list(figure.iter()):
            for place, child in enumerate(parent):
                if child.tag == "use":
                    parent[place] = _place_marker(shapes[child.attrib["href"].removeprefix("#")], child)
        for element in figure.iter():
            for name in ("id", "clip-path"):
                element.attrib.pop(name, None)
        for parent in list(figure.iter()):
            for child in [child for child in parent if child.tag == "defs"]:
                parent.remove(child)
        size = {"width": f"{self.width:g}", "height": f"{self.height:g}"}
        said = {"viewBox": f"0 0 {self.width:g} {self.height:g}", "role": "img", "aria-label": self.label}
        root = ElementTree.Element("svg", size | said)
        root.append(figure)
        return ElementTree.tostring(root, encoding="unicode")


def _clean_attribute(value: str) -> str:
    """Round the numbers of an attribute to tenths of a pixel, and replace colors by the page's variables."""
    value = re.sub(r"\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}", value)
    value = re.sub(
        r"#[0-9a-f]{6}", lambda color: f"var(--{_NAMES[color[0]]})" if color[0] in _NAMES else color[0], value
    )
    return " ".join(value.split())


def _place_marker(shape: ElementTree.Element, use: ElementTree.Element) -> ElementTree.Element:
    """Copy a marker to the position of a `use` element."""
    drawn = copy.deepcopy(shape)
    drawn.attrib["transform"] = f"translate({use.attrib['x']} {use.attrib['y']})"
    drawn.attrib["style"] = use.attrib.get("style", drawn.attrib.get("style", ""))
    return drawn
