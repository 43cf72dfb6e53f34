"""A language model's head apart from the rest of it, so that logits need not all be there at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightpeft.compat.stand_ins import StandIn
from lightpeft.compat.torch import has_hooks
from lightpeft.machine import random_apart
from lightpeft.models.patching import override_forward
from lightpeft.models.unwrap import transformers_model


def lone_head(model: nn.Module) -> nn.Linear | None:
    """The layer whose output is a language model's logits as it is, and can be computed without the model.

    Args:
        model: a transformers model, or a PeftModel around one.

    Returns:
        None: there is no such layer, something comes behind it (a cap, a scale), somebody watches it, or its weights
        are whole only while the model computes.
    """
    inner = transformers_model(model)
    head = language_head(inner)
    if head is None or has_hooks(head) or type(head.weight) not in (nn.Parameter, StandIn) or _followed(inner, head):
        return None
    return head


@contextmanager
def head_apart(head: nn.Linear | None) -> Iterator[None]:
    """Inside the block, a model gives the hidden states that enter its lone head where it gave logits; None: logits."""
    with nullcontext() if head is None else override_forward(head, lambda hidden: hidden):
        yield


def language_head(inner: Any) -> nn.Linear | None:
    """The layer of a transformers model that gives logits of tokens; None: it has none, or more than a layer."""
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    return head if type(head) is nn.Linear else None


def two_tokens(inner: Any) -> dict[str, Tensor]:
    """A row to find out by how a language model computes."""
    tokens = torch.zeros(1, 2, dtype=torch.long, device=inner.get_input_embeddings().weight.device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@contextmanager
def given_by(head: nn.Linear) -> Iterator[list[Tensor]]:
    """Inside the block, all that the head gives is kept; there are no graph, and no random numbers of the run."""
    given: list[Tensor] = []
    usual = head.forward

    def project(hidden: Tensor) -> Tensor:
        given.append(usual(hidden))
        return given[-1]

    with override_forward(head, project), torch.no_grad(), random_apart(head.weight.device):  # dropout draws numbers
        yield given


def _followed(inner: Any, head: nn.Linear) -> bool:
    """Whether the model's logits are not what the head gives, as it is: tried with two tokens."""
    try:
        with given_by(head) as given:
            logits = inner(**two_tokens(inner)).logits
    except Exception:  # noqa: BLE001 - it wants other inputs, in one of many ways
        return True
    return len(given) != 1 or logits is not given[0]
