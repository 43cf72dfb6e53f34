"""The language-modelling head, computed in training only where the loss reads it, and some tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from lightpeft.compat.torch import is_watched
from lightpeft.compat.transformers import causal_loss, has_causal_loss, override_loss
from lightpeft.machine import compute_dtype
from lightpeft.models.batches import IGNORED
from lightpeft.models.head import language_head, record_head, two_tokens
from lightpeft.models.patching import override_forward
from lightpeft.models.unwrap import transformers_model

_AT_ONCE, _AT_ONCE_ON_CPU = 2**28, 2**25
"""Bytes of logits, in float32, that are in memory at a time: few beside a model's, and enough to keep products busy."""
_LEAST_AT_ONCE = 64
"""Tokens whose logits are, however wide a vocabulary is."""


@contextmanager
def labelled_head(model: nn.Module) -> Iterator[None]:
    """Inside the block a causal language model in training computes logits of those tokens alone that have a label.

    Prompts and padding have none, and a vocabulary is much wider than a hidden state: the head and the softmax over its
    output take a good part of a step's time and most of its memory. The loss is the same but for the order of its sum.
    `logits` of a model's output in training are then [1, labelled tokens, vocabulary].

    Where the head is frozen and its logits go straight to the loss, they are never all there: they, the loss and what
    goes back to the hidden states are computed some tokens at a time, and `logits` are [1, labelled tokens, 0].

    Models that have no such head, do not hand its logits to transformers' loss, or have a loss of their own are left
    alone, and so are calls without labels.

    Args:
        model: a transformers model, or a PeftModel around one.
    """
    inner = transformers_model(model)
    head = language_head(inner)
    way = _way_to_loss(inner, head) if head is not None and has_causal_loss(inner) else None
    if head is None or way is None:
        yield
        return
    labelled = _Labelled(head, straight=way == "straight")
    handle = inner.register_forward_pre_hook(labelled.begin, with_kwargs=True)
    try:
        with override_loss(inner, labelled.loss), override_forward(head, labelled.project):
            yield
    finally:
        handle.remove()


def _way_to_loss(inner: Any, head: nn.Linear) -> str | None:
    """How logits get from the head to transformers' loss, tried with two tokens.

    Returns:
        "straight": as they are; "changed": position by position; None: in another way, or not at all.
    """
    taken: list[Tensor] = []

    def loss(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        taken.append(logits)
        return logits.new_zeros(())

    inputs = two_tokens(inner)
    tokens = inputs["input_ids"]
    try:
        with override_loss(inner, loss), record_head(head) as given:
            inner(**inputs, labels=tokens)
    except Exception:  # noqa: BLE001 - it wants other inputs, in one of many ways
        return None
    if [logits.shape[:-1] for logits in taken] != [tokens.shape]:
        return None
    return "straight" if len(given) == 1 and taken[0] is given[0] else "changed"


class _Labelled:
    """One model's head and loss."""

    def __init__(self, head: nn.Linear, *, straight: bool) -> None:
        """
        Args:
            straight: the head's logits go to the loss as they are.
        """
        self._head, self._straight = head, straight
        self._project: Callable[[Tensor], Tensor] = head.forward
        self._next: Tensor | None = None
        """Label of each position's next token, [rows, length]; None: logits are wanted everywhere."""
        self._labels: Tensor | None = None
        """Those of labelled tokens, [labelled tokens]; None: the logits of the call under way are of all tokens."""
        self._sum: Tensor | None = None
        """The loss of labelled tokens; None: it is not computed yet."""

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: which logits the loss will read."""
        labels = kwargs.get("labels")
        elsewhere = kwargs.get("shift_labels") is not None or kwargs.get("logits_to_keep")
        self._next = self._labels = self._sum = None
        if module.training and not elsewhere and isinstance(labels, Tensor) and labels.dim() == 2:
            self._next = pad(labels, (0, 1), value=IGNORED)[:, 1:]

    def project(self, hidden: Tensor) -> Tensor:
        """The head's forward: [rows, length, hidden] -> [1, labelled tokens, vocabulary], or logits of all tokens."""
        if self._next is None or hidden.shape[:-1] != self._next.shape:
            return self._project(hidden)
        following = self._next.to(hidden.device)
        labelled = following != IGNORED
        hidden, self._labels = hidden[labelled], following[labelled]
        dtype = self._computed_in(hidden)
        if dtype is None:
            return self._project(hidden)[None]
        self._sum = _SummedLoss.apply(hidden.to(dtype), self._head.weight, self._head.bias, self._labels)
        return hidden.new_empty(1, len(hidden), 0)

    def _computed_in(self, hidden: Tensor) -> torch.dtype | None:
        """The data type of logits that nobody but the loss reads; None: somebody else may, or gradients need them.

        In float16, gradients that are not scaled yet would be too small.
        """
        weight, bias = self._head.weight, self._head.bias
        parts = [weight] if bias is None else [weight, bias]
        if not self._straight or is_watched(self._head) or any(part.requires_grad for part in parts):
            return None
        dtype = compute_dtype(hidden, *parts)
        return None if dtype == torch.float16 else dtype

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """transformers' loss, of the logits that are there.

        Args:
            num_items_in_batch: labels that it is a mean over; None: those of this call.
        """
        total, self._sum = self._sum, None  # which holds on to the graph
        if total is not None and self._labels is not None:
            count = len(self._labels) if num_items_in_batch is None else num_items_in_batch
            return total / (count.to(total.device) if isinstance(count, Tensor) else count)
        if self._labels is not None:
            kwargs["shift_labels"] = self._labels[None]
        return causal_loss(logits, labels, vocab_size, num_items_in_batch, **kwargs)


class _SummedLoss(torch.autograd.Function):
    """Cross-entropy of `softmax(W x + b)`, summed over tokens, with a frozen W.

    Gradients are computed on the way forward, while the logits are there; no product of matrices is more than usual.
    PyTorch 2.13 has `linear_cross_entropy`, which does so, too; older ones that lightpeft runs with have none.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """
        Args:
            hidden: x, [tokens, channels], of the data type of the computation.
            weight, bias: [vocabulary, channels] and [vocabulary], of any.
            labels: [tokens].

        Returns:
            [], float32.
        """
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
        gradient = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        at_once = max((_AT_ONCE_ON_CPU if hidden.is_cpu else _AT_ONCE) // (4 * len(weight)), _LEAST_AT_ONCE)
        split = partial(torch.chunk, chunks=max(-(-len(hidden) // at_once), 1))
        with torch.autocast(hidden.device.type, enabled=False):
            for states, wanted, back in zip(*map(split, (hidden, labels[:, None], gradient)), strict=True):
                logits = nn.functional.linear(states, weight, bias)
                scores = torch.log_softmax(logits, -1, dtype=torch.float32)
                total -= scores.gather(-1, wanted).sum()
                of_logits = scores.exp_().scatter_add_(-1, wanted, scores.new_full(wanted.shape, -1.0))
                torch.mm(logits.copy_(of_logits), weight, out=back)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (of_hidden,) = ctx.saved_tensors
        return (of_hidden.float() * gradient).to(of_hidden.dtype), None, None, None  # a rounded factor would be off
