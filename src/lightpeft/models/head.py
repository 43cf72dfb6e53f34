"""The head of a language model, apart from the model, so that logits can be computed in parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightpeft.compat.stand_ins import StandIn
from lightpeft.compat.torch import has_hooks
from lightpeft.machine import preserve_random_state
from lightpeft.models.patching import override_forward
from lightpeft.models.unwrap import transformers_model


def lone_head(model: nn.Module) -> nn.Linear | None:
    """Return the layer whose output is exactly a language model's logits, if it can be computed without the model.

    Args:
        model: a transformers model, or a PeftModel around one.

    Returns:
        None if there is no such layer, the logits are changed after it (capped, scaled), it has hooks, or its weight is
        no plain parameter (such as a sharded one).
    """
    inner = transformers_model(model)
    head = language_head(inner)
    if (
        head is None
        or has_hooks(head)
        or type(head.weight) not in (nn.Parameter, StandIn)
        or _changes_head_output(inner, head)
    ):
        return None
    return head


@contextmanager
def skip_head(head: nn.Linear | None) -> Iterator[None]:
    """Make a model return the input of its head in place of logits inside the block; None: change nothing."""
    with nullcontext() if head is None else override_forward(head, lambda hidden: hidden):
        yield


@contextmanager
def contiguous_head(model: nn.Module) -> Iterator[None]:
    """Give the head of a language model its input in contiguous memory inside the block; no other module changes.

    transformers slices the last position out of the states. From such a view, torch multiplies by one copy of the head
    for each row if the head is frozen and in bfloat16, on a CPU: 4.4 GB for 16 rows and a vocabulary of 152,000.
    """
    head = language_head(transformers_model(model))
    if head is None:
        yield
        return
    usual = head.forward
    with override_forward(head, lambda hidden: usual(hidden.contiguous())):
        yield


def language_head(inner: Any) -> nn.Linear | None:
    """Return the linear layer of a transformers model that computes logits; None: there is no such layer."""
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    return head if type(head) is nn.Linear else None


def two_tokens(inner: Any) -> dict[str, Tensor]:
    """Return a batch of one row with two tokens, for a test of how a language model computes."""
    tokens = torch.zeros(1, 2, dtype=torch.long, device=inner.get_input_embeddings().weight.device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@contextmanager
def record_head(head: nn.Linear) -> Iterator[list[Tensor]]:
    """Record all outputs of the head inside the block, without gradients and with the random state restored."""
    given: list[Tensor] = []
    usual = head.forward

    def project(hidden: Tensor) -> Tensor:
        given.append(usual(hidden))
        return given[-1]

    apart = preserve_random_state(head.weight.device)  # dropout draws numbers
    with override_forward(head, project), torch.no_grad(), apart:
        yield given


def _changes_head_output(inner: Any, head: nn.Linear) -> bool:
    """Return whether the model changes the output of its head, by a test with two tokens."""
    try:
        with record_head(head) as given:
            logits = inner(**two_tokens(inner)).logits
    except Exception:  # noqa: BLE001 - models that need other inputs may raise any exception
        return True
    return len(given) != 1 or logits is not given[0]
