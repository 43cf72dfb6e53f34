"""What a search for a budget takes of a run, counted before it begins.

Counted in passes of a row through the blocks, not timed: the same run finds the same budget on every machine. A step of
plain PEFT takes a row forward and back through all blocks; a copy that a search trains goes back through those alone
that have PEFT modules, and through what a cut has left of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_IN_POINTS, _IN_NATS = 0.3, 0.1
"""Part of the blocks that a probed budget takes, by what the tolerance is given in: of most models that give no class,
less can go."""


@dataclass(frozen=True)
class SearchCost:
    """The rows that a search and its run go through."""

    run: int
    """Of the run's steps, repeated ones included, in one process."""
    trained: int
    """That a copy trains on."""
    held: int
    """That each copy is measured on."""
    few: int
    """That tell how much the loss rises by a cut."""
    cuts: Sequence[float]
    """Parts of the blocks that are there which are cut to see that."""
    answered: bool
    """Whether the whole model answers all that are held, to tell what a nat is worth."""
    graph: float
    """Part of the blocks that gradients of a copy go back through."""
    gone: float
    """Part of the blocks that is gone before."""
    most: float
    """Part of the time of plain PEFT's run that may be taken."""

    def of_plain(self, probed: Sequence[float]) -> float:
        """Part of the time of plain PEFT's run that it takes to probe these budgets; of none, to see the rise alone."""
        seen = (self.held if self.answered else self.few) + self.few * sum(1 - part for part in self.cuts)
        a_copy = self.trained * (1 + self.graph) + self.held
        copies = sum(1 - blocks for blocks in (self.gone, *probed)) if probed else 0
        return ((1 - self.gone) * seen + copies * a_copy) / (2 * self.run)

    @property
    def least(self) -> float:
        """The same of one budget, so small that it saves nothing."""
        return self.of_plain([self.gone])

    @property
    def usual(self) -> float:
        """The same of two budgets, as many searches ask for."""
        part = _IN_POINTS if self.answered else _IN_NATS
        return self.of_plain([self.gone + part * (1 - self.gone)] * 2)

    def allows(self, probed: Sequence[float]) -> bool:
        """Whether so many budgets may be probed."""
        return self.of_plain(probed) <= self.most
