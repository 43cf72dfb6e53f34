"""How much may go: what `light.blocks: auto` stands for, found when estimation is over."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

from peft import PeftModel
from torch import Tensor

from lightpeft.config import LightConfig, Tolerance
from lightpeft.errors import require
from lightpeft.plans.records import EstimationRecord
from lightpeft.prune.budgeting import FoundBudget, find_budget
from lightpeft.prune.curve import gone_before
from lightpeft.recipe.probes import SearchRoom, make_probe, why_unmeasured

_log = logging.getLogger(__name__)
USUAL_NATS = "0.05 nats"
"""`light.tolerance: auto` where all that is known is the loss."""


class BudgetMixin:
    """Mixin of `LightTraining`: the budget that a tolerance bears."""

    light_config: LightConfig
    fast_steps: bool
    light_rows_told = ""
    """The training rows as the caller counts them, for lines about their number; empty: as they train."""
    _peft_model: PeftModel

    def find_light_budget(self, record: EstimationRecord, steps: int) -> FoundBudget:
        """The largest part of the blocks that may go within `light.tolerance`, for the model as estimation left it.

        Args:
            steps: of the whole run.
        """
        started = time.perf_counter()
        trainer: Any = self
        gone = gone_before(record)
        reason = why_unmeasured(SearchRoom.of(trainer), self.light_config, steps, gone)
        if reason is not None:
            return FoundBudget.fixed(reason, record.meta.get("learned"), gone)
        seen = trainer.rows_of_steps(record.meta["steps"])
        probe = make_probe(trainer, self.light_config, steps, seen, self.fast_steps, gone)
        asked = self.light_tolerance()
        worth = self.light_points_a_nat if asked.unit == "points" else None
        announce = self.announce_light_budget
        found = find_budget(self._peft_model, record, self.light_config, probe, asked, worth, announce)
        return replace(found, seconds=time.perf_counter() - started)

    def announce_light_budget(self, line: str) -> None:
        """Say how far the search has come, which may take minutes. To be overridden."""
        _log.info("%s", line)

    def light_tolerance(self) -> Tolerance:
        """`light.tolerance`, or the usual one. To be overridden.

        Raises:
            LightPeftError: it is one of points, and what a trainer has is a loss.
        """
        tolerance = self.light_config.tolerance
        asked = Tolerance.read(USUAL_NATS if tolerance == "auto" else tolerance)
        require(asked.unit == "nats", f'light.tolerance is "{asked}"; a trainer knows of its loss alone: give nats')
        return asked

    def light_points_a_nat(self, classes: Tensor, right: Tensor) -> float:
        """Points of the task's metric that a nat of its loss is worth. To be overridden where `light_tolerance` may be
        one of points.

        Args:
            classes: that the model gives rows which are set aside, [rows].
            right: the classes that these have, [rows].
        """
        raise NotImplementedError("a trainer knows of its loss alone")
