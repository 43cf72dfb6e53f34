"""Computation of a budget search as a part of the run, counted before it begins.

The unit is one pass of a row through the blocks, not seconds, so that a run finds the same budget on every machine. A
step of plain PEFT runs a row forward and backward through all blocks; the backward pass of a copy in a search runs
through the blocks with PEFT modules only, and through what a cut has left of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_IN_POINTS, _IN_NATS = 0.3, 0.1
"""Typical probed budget, as a part of the blocks, by the unit of the tolerance: most models without classes allow
smaller cuts."""


@dataclass(frozen=True)
class SearchCost:
    """Row counts of a search and of its run, and the computation that follows from them."""

    run: int
    """Rows of all steps of the run in one process, repeated ones included."""
    trained: int
    """Rows that a copy trains on."""
    held: int
    """Held-out rows that each copy is measured on."""
    few: int
    """Held-out rows that measure the rise of the loss right after a cut."""
    cuts: Sequence[float]
    """Cuts that are measured so, as parts of the blocks that are there."""
    answered: bool
    """True if the uncut model runs on all held-out rows, to convert points into nats."""
    graph: float
    """Part of the blocks in the backward pass of a copy."""
    gone: float
    """Part of the blocks that was dropped before estimation."""
    most: float
    """Largest cost allowed, as a part of plain PEFT's run."""

    def of_plain(self, probed: Sequence[float]) -> float:
        """Return the cost of probing these budgets, as a part of plain PEFT's run; with no budgets, of the curve
        alone."""
        seen = (self.held if self.answered else self.few) + self.few * sum(1 - part for part in self.cuts)
        a_copy = self.trained * (1 + self.graph) + self.held
        copies = sum(1 - blocks for blocks in (self.gone, *probed)) if probed else 0
        return ((1 - self.gone) * seen + copies * a_copy) / (2 * self.run)

    @property
    def least(self) -> float:
        """Cost of a search with one probe, so small that its cut saves no computation."""
        return self.of_plain([self.gone])

    @property
    def usual(self) -> float:
        """Cost of a typical search, with two probes."""
        part = _IN_POINTS if self.answered else _IN_NATS
        return self.of_plain([self.gone + part * (1 - self.gone)] * 2)

    def allows(self, probed: Sequence[float]) -> bool:
        """Return True if probing these budgets costs at most `most`."""
        return self.of_plain(probed) <= self.most
