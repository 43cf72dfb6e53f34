"""How much worse a task may get: costs in the unit of a tolerance, for people."""

from __future__ import annotations


def cost_in_words(nats: float, points_a_nat: float | None) -> str:
    """A rise of the loss in the unit of the tolerance, for people.

    Args:
        points_a_nat: of the task's metric that a nat is worth; None: the tolerance is in nats.
    """
    value, unit = (nats, "nat") if points_a_nat is None else (nats * points_a_nat, "point")
    shown = f"{float(f'{value:.2g}'):g}"
    return f"{shown} {unit}{'s' * (shown != '1')}"


def tolerance_in_words(nats: float, points_a_nat: float | None) -> str:
    """A tolerance, for people; one in points also as the rise of the loss that it stands for."""
    loss = "" if points_a_nat is None else f" ({cost_in_words(nats, None)})"
    return f"{cost_in_words(nats, points_a_nat)}{loss}"
