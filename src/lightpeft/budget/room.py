"""Whether a run has room for a search, and how large that may be: how much it trains on, and looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightpeft.budget.cost import SearchCost
from lightpeft.config import LightConfig, Tolerance
from lightpeft.training.host import Host
from lightpeft.training.schedule import pace_of
from lightpeft.training.step_rows import rows_a_step

PARTS = (0.2, 0.4, 0.6)
"""Of the blocks that are there, what is cut to see the rise of the loss before anything trains; between them it lies on
a line. No more than the last is found of a model that has all of its blocks (`budget.search.MOST`)."""
PART = 0.04
"""Part of a run's steps that a probe takes."""
LEAST_STEPS, MOST_STEPS = 8, 64
"""From some 20 on, more of them hardly leave less of what a cut costs."""
SEARCH_FRACTION = 0.15
"""Part of the time of plain PEFT's run that a search may take, by its count of passes through the model; where none is
that short, there is none (docs/explanation/results.md#what-a-budget-costs)."""
HELD_PART = 0.035
"""Rows that are set aside, as a part of all that the run's steps see. With this, and with probes of one whole model and
of one or two cut ones, finding a budget takes a seventh of plain PEFT's run. The least numbers here would make that
more of a run of few steps, where fewer budgets are probed then, or none (`SEARCH_FRACTION`)."""
LEAST_HELD, MOST_HELD = 128, 1024
_MOST_OF_ROWS = 1 / 4
"""Part of the rows that may be set aside."""
_HELD_BATCHES, _LEAST_IN_BATCH = 24, 8
"""Batches that rows set aside come in, or more: so many tell how sure a mean is, and larger ones take less time."""
_FEW, _FEWEST_ROWS, _FEWEST_BATCHES = 1 / 4, 128, 6
"""Part of the rows set aside that tell how much the loss rises by a cut, which is many times what is left of it, and
what they are at least."""
_SIZES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.0)
"""Parts of the usual sizes that are tried, one after another; the last one is the least numbers above."""


@dataclass(frozen=True)
class Sizes:
    """How much a search trains on and looks at."""

    steps: int
    """Of a probe."""
    aside: int
    """Rows that are set aside."""
    most_in_batch: int
    """Rows a batch of training has."""

    @property
    def in_batch(self) -> int:
        """Rows of a batch of those set aside."""
        return max(_LEAST_IN_BATCH, min(self.most_in_batch, self.aside // _HELD_BATCHES))

    @property
    def few(self) -> int:
        """Batches of these that tell how much the loss rises by a cut."""
        part = max(_FEW, _FEWEST_ROWS / max(self.aside, 1))
        return max(_FEWEST_BATCHES, round(part * math.ceil(self.aside / self.in_batch)))


@dataclass(frozen=True)
class SearchRoom:
    """What a run has for a search."""

    rows: int | None
    """Training rows; None: of no known number."""
    batch_size: int
    """Rows that a process takes at once."""
    rows_a_step: int
    """Rows of an optimizer step, of all processes together."""
    processes: int
    points: bool
    """Whether the tolerance is in points of the task's metric."""
    sharded: bool = False
    """Whether FSDP shards the model."""

    @classmethod
    def of(cls, trainer: Host, tolerance: Tolerance, *, sharded: bool = False) -> SearchRoom:
        """That of a trainer."""
        pace, args = pace_of(trainer), trainer.args
        return cls(
            rows=None if pace is None else pace.rows,
            batch_size=args.train_batch_size,
            rows_a_step=rows_a_step(args),
            processes=args.world_size,
            points=tolerance.unit == "points",
            sharded=sharded,
        )

    def aside(self, seen: float) -> int:
        """How many rows are set aside of a run that goes through so many, repeated ones included."""
        most = int(_MOST_OF_ROWS * (self.rows or 0))
        return min(max(LEAST_HELD, int(HELD_PART * seen)), MOST_HELD, most)


def sizes_of(room: SearchRoom, light: LightConfig, steps: int, gone: float = 0.0) -> tuple[Sizes, SearchCost]:
    """The sizes of a search, and what it takes with these: as large as they are of long runs, or as may be.

    Args:
        steps: of the whole run.
        gone: part of the blocks that is gone before.
    """
    each = room.rows_a_step

    def sized(part: float) -> tuple[Sizes, SearchCost]:
        length = min(max(LEAST_STEPS, round(part * PART * steps)), MOST_STEPS)
        size = Sizes(length, room.aside(part * steps * each), room.batch_size)
        cost = SearchCost(
            run=steps * each // room.processes,  # each process makes all of a search
            trained=size.steps * each,
            held=size.aside,
            few=min(size.few * size.in_batch, size.aside),
            cuts=PARTS,
            answered=room.points,
            graph=light.modules.blocks or 1.0,
            gone=gone,
            most=SEARCH_FRACTION,
        )
        return size, cost

    sizes = [sized(part) for part in _SIZES]
    return next((found for found in sizes if found[1].usual <= SEARCH_FRACTION), sizes[-1])


def why_unmeasured(room: SearchRoom, light: LightConfig, steps: int, gone: float = 0.0) -> str | None:
    """Why probes cannot measure a budget here; None: they can.

    Args:
        steps: of the whole run.
        gone: part of the blocks that is gone before.
    """
    if room.sharded:
        return "a search for a budget copies the model, and FSDP shards it"
    if room.rows is None:
        return "a search for a budget sets rows aside, and the number of rows is not known"
    if room.aside(0) < LEAST_HELD:
        needed = f"a search for a budget needs {int(LEAST_HELD / _MOST_OF_ROWS)} training rows"
        return f"{needed}, and {room.rows} train"
    _, cost = sizes_of(room, light, steps, gone)
    if cost.least <= cost.most:
        return None
    takes = f"a search for a budget would take {100 * cost.least:.3g}% of the time of plain PEFT's run of {steps} steps"
    return f"{takes}, and it may take {100 * cost.most:.3g}%"
