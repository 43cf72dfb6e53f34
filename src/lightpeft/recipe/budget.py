"""How much may go: what `light: auto` stands for, found when estimation is over."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from lightpeft.config import LightConfig, Tolerance, tolerance_of
from lightpeft.errors import require
from lightpeft.plans.budgets import accuracy_a_nat
from lightpeft.plans.records import EstimationRecord
from lightpeft.prune.budgeting import FoundBudget, find_budget
from lightpeft.prune.curve import gone_before
from lightpeft.recipe.probes import SearchRoom, make_probe, why_unmeasured
from lightpeft.recipe.settling import gives_classes

_log = logging.getLogger(__name__)


class BudgetMixin:
    """Mixin of `LightTraining`: the budget that a tolerance bears."""

    light_config: LightConfig
    fast_steps: bool
    light_rows_told = ""
    """The training rows as the caller counts them, for lines about their number; empty: as they train."""
    _peft_model: PeftModel

    def find_light_budget(self, record: EstimationRecord, steps: int) -> FoundBudget:
        """The largest part of the blocks that may go within the tolerance, for the model as estimation left it.

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
        """`light.remove.tolerance`, or the usual one. To be overridden.

        Raises:
            LightPeftError: it is one of points, and the model gives no classes by a loss that is known.
        """
        trainer: Any = self
        classes = trainer._reads_loss_alone() and gives_classes(self._peft_model, trainer.train_dataset)
        asked = tolerance_of(self.light_config, classes)
        what = f'light.remove.tolerance is "{asked}", and the trainer knows of no classes'
        require(classes or asked.unit == "nats", f"{what}; give nats of the loss")
        return asked

    def light_points_a_nat(self, classes: Tensor, right: Tensor) -> float:
        """Points of the task's metric, which is accuracy, that a nat of its loss is worth. To be overridden.

        Args:
            classes: that the model gives rows which are set aside, [rows].
            right: the classes that these have, [rows].
        """
        known = max(2, int(torch.cat([classes, right]).max()) + 1)
        return accuracy_a_nat(int((classes == right).sum()), len(right), known)
