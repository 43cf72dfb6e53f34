"""Drawing: an SVG element that stands in a page as it is, and scales of its axes. Colours are the page's, by class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree import ElementTree

from lightpeft.errors import require

Point = tuple[float, float]


class Drawing:
    """One figure, in units of a pixel.

    Its parts have classes, for which the page's style sheet has colours. What may come from outside (labels, hints) is
    escaped when the figure becomes text.
    """

    def __init__(self, width: float, height: float, label: str) -> None:
        """
        Args:
            label: what it shows, for those who cannot see it.
        """
        size = {"viewBox": f"0 0 {_n(width)} {_n(height)}", "width": _n(width), "height": _n(height)}
        self.width, self.height = width, height
        self.root = ElementTree.Element("svg", {**size, "role": "img", "aria-label": label})

    def __html__(self) -> str:
        """As it stands in a page, for a template that escapes all else."""
        return ElementTree.tostring(self.root, encoding="unicode")

    def rect(self, x: float, y: float, width: float, height: float, style: str, hint: str = "") -> None:
        """A rectangle by its upper left corner."""
        size = {"x": _n(x), "y": _n(y), "width": _n(max(width, 0)), "height": _n(height)}
        self._add("rect", size, style, hint)

    def cells(self, places: Sequence[Point], width: float, height: float, style: str, hint: str = "") -> None:
        """Rectangles of one size, as one element."""
        if places:
            box = f"h{_n(width)}v{_n(height)}h{_n(-width)}z"
            self._add("path", {"d": "".join(f"M{_n(x)} {_n(y)}{box}" for x, y in places)}, style, hint)

    def line(self, start: Point, end: Point, style: str, hint: str = "") -> None:
        """A straight line."""
        self._add("path", {"d": _path([start, end])}, style, hint)

    def polyline(self, points: Sequence[Point], style: str, hint: str = "") -> None:
        """A line through points."""
        if len(points) > 1:
            self._add("path", {"d": _path(points), "fill": "none"}, style, hint)

    def dot(self, at: Point, radius: float, style: str, hint: str = "") -> None:
        """A disc."""
        self._add("circle", {"cx": _n(at[0]), "cy": _n(at[1]), "r": _n(radius)}, style, hint)

    def text(self, at: Point, words: str, style: str = "", anchor: str = "start") -> None:
        """A line of text, by its base line; `anchor` is "start", "middle" or "end"."""
        place = {"x": _n(at[0]), "y": _n(at[1]), **({} if anchor == "start" else {"text-anchor": anchor})}
        self._add("text", place, style).text = words

    def _add(self, name: str, attributes: dict[str, str], style: str, hint: str = "") -> ElementTree.Element:
        element = ElementTree.SubElement(self.root, name, {**attributes, **({"class": style} if style else {})})
        if hint:
            ElementTree.SubElement(element, "title").text = hint
        return element


def _n(value: float) -> str:
    """A number in as few characters as a tenth of a pixel needs."""
    return f"{round(value, 1) + 0:g}"


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points)


@dataclass(frozen=True)
class Scale:
    """Values along an axis -> pixels."""

    low: float
    high: float
    start: float
    """Pixel of `low`."""
    end: float
    """Pixel of `high`."""

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, *, zero: bool = False) -> Scale:
        """One on which all values have room.

        Args:
            zero: it begins or ends at 0.

        Raises:
            LightPeftError: they are further apart than numbers go.
        """
        low, high = min(values), max(values)
        require(math.isfinite(2 * (high - low)), f"{low:g} and {high:g} cannot be drawn on one axis")
        low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
        if high - low <= 1e-12 * max(abs(high), 1.0):
            low, high = low - 0.5 * (not zero or low < 0), high + 0.5
        else:
            margin = 0.04 * (high - low)
            low, high = low - margin * (not zero or low < 0), high + margin * (not zero or high > 0)
        return cls(low, high, start, end)

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values inside, evenly spaced."""
        rough = (self.high - self.low) / max(most, 1)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) for index in range(first, last + 1)]


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """A tick's label, with as many digits as tell the ticks apart."""
    step = min((b - a for a, b in pairwise(ticks)), default=1.0)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{digits}f}".replace("-", "\u2212")
