"""Costs and tolerances as text, in points or in nats."""

from __future__ import annotations


def cost_in_words(nats: float, points_per_nat: float | None) -> str:
    """Return a rise of the loss as text, in the unit of the tolerance.

    Args:
        nats: the rise.
        points_per_nat: points of the task's metric per nat; None: the tolerance is in nats.

    Example:
        >>> cost_in_words(0.02, 25.0)
        '0.5 points'
    """
    value, unit = (nats, "nat") if points_per_nat is None else (nats * points_per_nat, "point")
    shown = f"{float(f'{value:.2g}'):g}"
    return f"{shown} {unit}{'s' * (shown != '1')}"


def tolerance_in_words(nats: float, points_per_nat: float | None) -> str:
    """Return a tolerance as text; for one in points, also the equivalent rise of the loss.

    Example:
        >>> tolerance_in_words(0.04, 25.0)
        '1 point (0.04 nats)'
    """
    loss = "" if points_per_nat is None else f" ({cost_in_words(nats, None)})"
    return f"{cost_in_words(nats, points_per_nat)}{loss}"
