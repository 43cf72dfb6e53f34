"""The size of a budget search that a run has room for: training steps and held-out rows, or none at all."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightpeft.budget.cost import SearchCost
from lightpeft.config import LightConfig, Tolerance
from lightpeft.training.host import Host
from lightpeft.training.schedule import pace_of
from lightpeft.training.step_rows import rows_per_step

SEARCH_BUDGETS = (0.2, 0.4, 0.6)
"""Budgets of the loss curve, as parts of the blocks that are there; the rise between them is interpolated linearly. A
model that has all of its blocks gets no larger budget than the last one (`budget.search.MOST`)."""
PROBE_PART = 0.04
"""Steps of a probe, as a part of the run's steps."""
LEAST_PROBE_STEPS, MOST_PROBE_STEPS = 8, 64
"""Limits of a probe's steps. Beyond about 20, more steps hardly recover more of the loss."""
SEARCH_FRACTION = 0.15
"""Largest cost of a search, as a part of plain PEFT's run, in passes through the model; if even the smallest search
costs more, there is no search (docs/explanation/results.md#what-a-budget-costs)."""
SEARCH_HELD_PART = 0.035
"""Held-out rows, as a part of all rows that the run's steps see. With this, and with probes of the uncut model and of
one or two cuts, a search costs a seventh of plain PEFT's run. In short runs the minimums here cost more than that; then
fewer budgets are probed, or none (`SEARCH_FRACTION`)."""
LEAST_HELD, MOST_HELD = 128, 1024
_MOST_OF_ROWS = 1 / 4
"""Largest number of held-out rows, as a part of the training rows."""
_HELD_BATCHES, _LEAST_IN_BATCH = 24, 8
"""Least number of batches of held-out rows, for the standard error of a mean, and least rows per batch, for speed."""
_FEW, _FEWEST_ROWS, _FEWEST_BATCHES = 1 / 4, 128, 6
"""Held-out rows for the rise right after a cut, as a part of all held-out rows, with minimums in rows and batches. Few
are enough: this rise is many times the one that is left after training."""
_SIZES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.0)
"""Factors of a search's size that are tried in order until its cost is allowed; the last gives the minimums above."""


@dataclass(frozen=True)
class Sizes:
    """Training steps and held-out rows of a search."""

    steps: int
    """Optimizer steps of a probe."""
    aside: int
    """Held-out rows."""
    most_in_batch: int
    """Rows of a training batch, the largest batch of held-out rows."""

    @property
    def in_batch(self) -> int:
        """Rows per batch of held-out rows."""
        return max(_LEAST_IN_BATCH, min(self.most_in_batch, self.aside // _HELD_BATCHES))

    @property
    def few(self) -> int:
        """Batches of held-out rows that measure the rise right after a cut."""
        part = max(_FEW, _FEWEST_ROWS / max(self.aside, 1))
        return max(_FEWEST_BATCHES, round(part * math.ceil(self.aside / self.in_batch)))


@dataclass(frozen=True)
class SearchRoom:
    """Size of a run, which limits the size of a search."""

    rows: int | None
    """Training rows; None: the dataset has no length."""
    batch_size: int
    """Per-device batch size."""
    rows_per_step: int
    """Rows of an optimizer step over all processes (global batch)."""
    processes: int
    points: bool
    """True if the tolerance is in points of the task's metric."""
    sharded: bool = False
    """True if FSDP shards the model."""

    @classmethod
    def of(cls, trainer: Host, tolerance: Tolerance, *, sharded: bool = False) -> SearchRoom:
        """Return the size of a trainer's run."""
        pace, args = pace_of(trainer), trainer.args
        return cls(
            rows=None if pace is None else pace.rows,
            batch_size=args.train_batch_size,
            rows_per_step=rows_per_step(args),
            processes=args.world_size,
            points=tolerance.unit == "points",
            sharded=sharded,
        )

    def aside(self, seen: float) -> int:
        """Return the number of held-out rows.

        Args:
            seen: rows that the run's steps see, repeated ones included.
        """
        most = int(_MOST_OF_ROWS * (self.rows or 0))
        return min(max(LEAST_HELD, int(SEARCH_HELD_PART * seen)), MOST_HELD, most)


def sizes_of(room: SearchRoom, light: LightConfig, steps: int, gone: float = 0.0) -> tuple[Sizes, SearchCost]:
    """Return the size and the cost of a search: the full size, or the largest one whose cost is allowed.

    Args:
        steps: optimizer steps of the whole run.
        gone: part of the blocks that was dropped before estimation.
    """
    each = room.rows_per_step

    def sized(part: float) -> tuple[Sizes, SearchCost]:
        length = min(max(LEAST_PROBE_STEPS, round(part * PROBE_PART * steps)), MOST_PROBE_STEPS)
        size = Sizes(length, room.aside(part * steps * each), room.batch_size)
        cost = SearchCost(
            run=steps * each // room.processes,  # each process makes all of a search
            trained=size.steps * each,
            held=size.aside,
            few=min(size.few * size.in_batch, size.aside),
            cuts=SEARCH_BUDGETS,
            answered=room.points,
            graph=light.modules.blocks or 1.0,
            gone=gone,
            most=SEARCH_FRACTION,
        )
        return size, cost

    sizes = [sized(part) for part in _SIZES]
    return next((found for found in sizes if found[1].usual <= SEARCH_FRACTION), sizes[-1])


def why_unmeasured(room: SearchRoom, light: LightConfig, steps: int, gone: float = 0.0) -> str | None:
    """Return the reason why probes cannot measure a budget in this run; None: they can.

    Args:
        steps: optimizer steps of the whole run.
        gone: part of the blocks that was dropped before estimation.
    """
    if room.sharded:
        return "a budget search copies the model, and FSDP shards it"
    if room.rows is None:
        return "a budget search holds rows out, and the training dataset has no length"
    if room.aside(0) < LEAST_HELD:
        needed = f"a budget search needs {int(LEAST_HELD / _MOST_OF_ROWS)} training rows"
        return f"{needed}, but there are {room.rows}"
    _, cost = sizes_of(room, light, steps, gone)
    if cost.least <= cost.most:
        return None
    takes = f"a budget search would cost {100 * cost.least:.3g}% of the computation of plain PEFT's {steps} steps"
    return f"{takes}, and the limit is {100 * cost.most:.3g}%"
