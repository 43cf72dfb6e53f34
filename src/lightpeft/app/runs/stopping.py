"""Early stopping: training ends before its last step where the loss on held-out training rows rises.

`Trainer` does it: it evaluates at the end of each epoch, keeps the best checkpoint, and stops. (Prechelt 1998, "Early
stopping - but when?")
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback

from lightpeft.app.runs.workspace import Workspace
from lightpeft.profiling.live import losses_of
from lightpeft.recipe.parallel import broadcast_from_main

PATIENCE = 3
"""Number of epochs without a lower loss after which training stops."""


def stopping_arguments(work: Workspace) -> dict[str, Any]:
    """Return the fields of `TrainingArguments` for early stopping; none where training runs to its end."""
    if not work.stops_early:
        return {}
    epoch = work.pace.steps_per_epoch
    return {
        "eval_strategy": "steps",
        "eval_steps": epoch,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "restore_callback_states_from_checkpoint": True,
    }


def stopping_callbacks(work: Workspace) -> list[TrainerCallback]:
    """Return the callbacks for early stopping; none where training runs to its end."""
    return [EarlyStoppingCallback(PATIENCE)] if work.stops_early else []


def held_out_loss(work: Workspace, model: nn.Module, autocast: torch.dtype | None) -> float:
    """Compute the mean loss of the held-out rows.

    Args:
        autocast: half precision of the forward pass; None: that of the weights.
    """
    batches = work.held_batches()
    sizes = torch.tensor([len(batch["input_ids"]) for batch in batches], dtype=torch.float64)
    return broadcast_from_main(float((losses_of(model, batches, autocast) * sizes).sum() / sizes.sum()))


def stop_facts(trainer: Any, work: Workspace) -> dict[str, Any]:
    """Return the `stopped` entry of log and report if training kept an earlier model than its last; else nothing."""
    best, last = trainer.state.best_global_step, trainer.state.global_step
    if work.held_rows is None or not work.stops_early or not best or best == last:
        return {}
    rows, loss = len(work.held_rows), trainer.state.best_metric
    return {"stopped": {"step": last, "of": work.steps, "kept": best, "loss": loss, "held_out_rows": rows}}


def stop_line(told: dict[str, Any]) -> str:
    """Return the line about early stopping."""
    lowest = f"the loss on {told['held_out_rows']} held-out rows was lowest ({told['loss']:.3f}) at step {told['kept']}"
    return f"training stopped early at step {told['step']} of {told['of']}: {lowest}, and that model is kept"
