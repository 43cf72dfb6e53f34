"""The budget of a trainer's model: found by a search if the run has room for one, else fixed."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Protocol

from peft import PeftModel
from torch import Tensor

from lightpeft.budget.curve import gone_before
from lightpeft.budget.finding import find_budget
from lightpeft.budget.found import FoundBudget
from lightpeft.budget.probes import make_probe
from lightpeft.budget.room import SearchRoom, why_unmeasured
from lightpeft.config import LightConfig, Tolerance
from lightpeft.models.unwrap import transformers_model
from lightpeft.plans.estimation_record import EstimationRecord
from lightpeft.training.host import Host
from lightpeft.training.rows import rows_of_steps


class SearchHost(Host, Protocol):
    """Interface of a trainer for a budget search."""

    light_config: LightConfig
    light_plain_rate: float
    """Learning rate of plain PEFT, as in the trainer's arguments."""
    fast_steps: bool
    _peft_model: PeftModel

    def light_tolerance(self) -> Tolerance: ...
    def light_points_per_nat(self, classes: Tensor, right: Tensor) -> float: ...
    def announce_light_budget(self, line: str) -> None: ...


def budget_in(trainer: SearchHost, record: EstimationRecord, steps: int, *, sharded: bool) -> FoundBudget:
    """Find the largest part of the blocks that can be cut within the tolerance, for a model right after estimation.

    Args:
        record: scores of the estimation.
        steps: optimizer steps of the whole run.
        sharded: True if FSDP shards the model.
    """
    started, light, asked = time.perf_counter(), trainer.light_config, trainer.light_tolerance()
    gone = gone_before(record)
    room = SearchRoom.of(trainer, asked, sharded=sharded)
    reason = why_unmeasured(room, light, steps, gone)
    if reason is not None:
        of_tokens = type(transformers_model(trainer._peft_model)).__name__.endswith("ForTokenClassification")
        # a fixed budget was measured on models with one class per row
        return FoundBudget.fixed(reason, None if of_tokens else record.meta.get("learned"), gone)
    seen, rate = rows_of_steps(trainer, record.meta["steps"]), trainer.light_plain_rate
    probe = make_probe(trainer, room, light, steps, seen, rate, fast=trainer.fast_steps, gone=gone)
    worth = trainer.light_points_per_nat if asked.unit == "points" else None
    found = find_budget(trainer._peft_model, record, light, probe, asked, worth, trainer.announce_light_budget)
    return replace(found, seconds=time.perf_counter() - started)
