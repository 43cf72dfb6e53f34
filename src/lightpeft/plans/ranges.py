"""Ascending indices as short text."""

from __future__ import annotations

from collections.abc import Sequence

from lightpeft.errors import require


def to_ranges(indices: Sequence[int]) -> str:
    """Format ascending indices as ranges: (0, 1, 2, 5) -> "0-2,5"."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def from_ranges(text: str, below: int) -> tuple[int, ...]:
    """Parse the indices that `to_ranges` wrote, which must be ascending and below `below`.

    Raises:
        LightPeftError: the indices are not; it is raised before any range is expanded.
    """
    bounds = [part.split("-") for part in text.split(",") if part]
    ends = [(int(bound[0]), int(bound[-1])) for bound in bounds]
    before = -1
    for first, last in ends:
        require(before < first <= last < below, f"{text[:40]!r} are not ascending indices below {below}")
        before = last
    return tuple(index for first, last in ends for index in range(first, last + 1))
