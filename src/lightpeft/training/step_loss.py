"""The loss of a training step: a mean over the step, for any gradient accumulation and number of processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightpeft.compat.torch import ReadRecorder
from lightpeft.training.host import Host


def step_loss(usual: Callable[..., Any], trainer: Host, options: dict[str, Any], *, plain: bool) -> Any:
    """Compute a trainer's loss; divide a mean over a batch by the gradient accumulation steps.

    transformers assumes that every forward with **kwargs, and every `compute_loss_func`, divides by
    `num_items_in_batch`, and adds up the results. Many do not: most models' losses for classes, numbers, several
    labels and tags, and functions that return a mean. Their gradients would grow with accumulation steps and
    processes. A loss that does not read `num_items_in_batch` is taken for such a mean.

    Args:
        usual: the trainer's own `compute_loss`, with the model and inputs bound.
        options: its keyword arguments.
        plain: True if it is `Trainer`'s own method.
    """
    told = getattr(trainer, "loss_is_scaled_for_ga", None) is not None  # transformers asks from 5.19 on
    count = options.get("num_items_in_batch")
    if options.get("return_outputs") or count is None or told:  # evaluation, or nothing to find out
        return usual(**options)
    items = ReadRecorder.of(count)
    loss = usual(**{**options, "num_items_in_batch": items})
    if items.read:
        return loss
    if plain and trainer.args.average_tokens_across_devices:  # it was multiplied by these
        loss = loss / (trainer.accelerator.num_processes // trainer.get_tp_size())
    return loss / trainer.current_gradient_accumulation_steps
