"""Whether a model keeps the rows of a batch apart that lie one after another in one sequence, without padding."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from lightpeft.machine import autocasting
from lightpeft.models.patching import in_mode

_DIFFERENCE = 0.02
"""Largest difference of equal rows' logits, as a fraction of the largest logit; rounding in bfloat16 makes 0.01."""


@torch.no_grad()
def keeps_rows_apart(model: PreTrainedModel, autocast: torch.dtype | None = None) -> bool:
    """Return whether a decoder computes each row of a flattened batch as if it were alone.

    Collators such as transformers' `DataCollatorWithFlattening` put all rows of a batch into one sequence, with
    `position_ids` that begin anew at each row. Most models of transformers then mask attention between rows; some
    compute their own mask or positions, and rows would silently read those before them. The trial is a batch of two
    equal rows of two tokens: the model keeps them apart if it computes the same logits for both.

    Args:
        autocast: half precision of training, which flash attention needs if the weights are float32.
    """
    positions = torch.tensor([[0, 1, 0, 1]], device=model.device)
    with in_mode(model, training=False), autocasting(model.device, autocast):
        logits = model(input_ids=positions + 1, position_ids=positions, use_cache=False).logits.float()
    first, second = logits[0].chunk(2)
    return bool((first - second).abs().max() <= _DIFFERENCE * first.abs().max())
