"""The language-modelling head, computed in training only where the loss reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lightpeft.compat.transformers import causal_loss, has_causal_loss, loss_instead
from lightpeft.machine import random_apart
from lightpeft.models.patching import instead
from lightpeft.models.unwrap import transformers_model
from lightpeft.tasks.tokens import IGNORED


@contextmanager
def labelled_head(model: nn.Module) -> Iterator[None]:
    """Inside the block a causal language model in training computes logits of those tokens alone that have a label.

    Prompts and padding have none, and a vocabulary is much wider than a hidden state: the head and the softmax over its
    output take a good part of a step's time and most of its memory. The loss is the same but for the order of its sum.
    `logits` of a model's output in training are then [1, labelled tokens, vocabulary].

    Models that have no such head, do not hand its logits to transformers' loss, or have a loss of their own are left
    alone, and so are calls without labels.

    Args:
        model: a transformers model, or a PeftModel around one.
    """
    inner = transformers_model(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if type(head) is not nn.Linear or not _has_usual_loss(inner):
        yield
        return
    labelled = _Labelled(head.forward)
    handle = inner.register_forward_pre_hook(labelled.begin, with_kwargs=True)
    try:
        with loss_instead(inner, labelled.loss), instead(head, labelled.project):
            yield
    finally:
        handle.remove()


def _has_usual_loss(inner: Any) -> bool:
    """Whether the model's forward hands logits, position by position, to transformers' loss: tried with two tokens."""
    if not has_causal_loss(inner):
        return False
    seen: list[tuple[int, ...]] = []

    def loss(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(tuple(logits.shape[:-1]))
        return logits.new_zeros(())

    device = inner.get_input_embeddings().weight.device
    tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
    try:
        with loss_instead(inner, loss), torch.no_grad(), random_apart(device):  # dropout draws numbers
            inner(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens)
    except Exception:  # noqa: BLE001 - it wants other inputs, in one of many ways
        return False
    return seen == [tuple(tokens.shape)]


class _Labelled:
    """One model's head and loss."""

    def __init__(self, project: Callable[[Tensor], Tensor]) -> None:
        """
        Args:
            project: the head's own forward: hidden states to logits.
        """
        self._project = project
        self._next: Tensor | None = None
        """Label of each position's next token, [rows, length]; None: logits are wanted everywhere."""
        self._selected = False
        """Whether the logits of the call under way are those of labelled tokens alone."""

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: which logits the loss will read."""
        labels = kwargs.get("labels")
        elsewhere = kwargs.get("shift_labels") is not None or kwargs.get("logits_to_keep")
        self._next, self._selected = None, False
        if module.training and not elsewhere and isinstance(labels, Tensor) and labels.dim() == 2:
            self._next = pad(labels, (0, 1), value=IGNORED)[:, 1:]

    def project(self, hidden: Tensor) -> Tensor:
        """The head's forward: [rows, length, hidden] -> [1, labelled tokens, vocabulary], or logits of all tokens."""
        if self._next is None or hidden.shape[:-1] != self._next.shape:
            return self._project(hidden)
        self._selected = True
        return self._project(hidden[self._next.to(hidden.device) != IGNORED])[None]

    def loss(self, logits: Tensor, labels: Tensor, vocab_size: int, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' loss, of the logits that are there."""
        if self._selected and self._next is not None:
            kwargs["shift_labels"] = self._next[self._next != IGNORED][None]
        return causal_loss(logits, labels, vocab_size, *args, **kwargs)
