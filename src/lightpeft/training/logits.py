"""Language-model head in training: logits of labeled tokens only, with a chunked cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from lightpeft.compat.torch import has_hooks
from lightpeft.compat.transformers import causal_loss, has_causal_loss, override_loss
from lightpeft.machine import compute_dtype
from lightpeft.models.batches import IGNORED
from lightpeft.models.head import language_head, record_head, two_tokens
from lightpeft.models.patching import override_forward
from lightpeft.models.unwrap import transformers_model

_LOGIT_BYTES, _LOGIT_BYTES_ON_CPU = 2**28, 2**25
"""Bytes of float32 logits in memory at a time: few compared with a model, and enough for efficient matrix products."""
_LEAST_CHUNK = 64
"""Least tokens per chunk, however large the vocabulary is."""


@contextmanager
def labeled_head(model: nn.Module) -> Iterator[None]:
    """Compute the logits of labeled tokens only while a causal language model trains inside the block.

    Prompts and padding have no labels, and a vocabulary is much wider than a hidden state: the head and the softmax
    take a good part of a step's time and most of its memory. The loss is the same up to the order of its sum. The
    model's output then has `logits` of shape [1, labeled tokens, vocabulary].

    If the head is frozen and its logits go directly to the loss, cross-entropy is chunked: logits, loss and the
    gradient of hidden states are computed for some tokens at a time, and `logits` has shape [1, labeled tokens, 0].

    Models without such a head, or whose logits do not go to transformers' loss, are unchanged, and so are calls without
    labels.

    Args:
        model: a transformers model, or a PeftModel around one.
    """
    inner = transformers_model(model)
    head = language_head(inner)
    way = _way_to_loss(inner, head) if head is not None and has_causal_loss(inner) else None
    if head is None or way is None:
        yield
        return
    labeled = _LabeledHead(head, straight=way == "straight")
    handle = inner.register_forward_pre_hook(labeled.begin, with_kwargs=True)
    try:
        with override_loss(inner, labeled.loss), override_forward(head, labeled.project):
            yield
    finally:
        handle.remove()


def _way_to_loss(inner: Any, head: nn.Linear) -> str | None:
    """Find out how logits get from the head to transformers' loss, by a call with two tokens.

    Returns:
        "straight": unchanged; "changed": changed, with the same positions; None: another way, or not at all.
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


class _LabeledHead:
    """Replacements for one model's head and loss."""

    def __init__(self, head: nn.Linear, *, straight: bool) -> None:
        """
        Args:
            straight: True if the head's logits go to the loss unchanged.
        """
        self._head, self._straight = head, straight
        self._project: Callable[[Tensor], Tensor] = head.forward
        self._next: Tensor | None = None
        """Label of each position's next token, [rows, length]; None: compute logits of all tokens."""
        self._labels: Tensor | None = None
        """Labels of labeled tokens, [labeled tokens]; None: the current call computes logits of all tokens."""
        self._sum: Tensor | None = None
        """Summed loss of labeled tokens, []; None: not computed yet."""

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: note which tokens have labels."""
        labels = kwargs.get("labels")
        elsewhere = kwargs.get("shift_labels") is not None or kwargs.get("logits_to_keep")
        self._next = self._labels = self._sum = None
        if module.training and not elsewhere and isinstance(labels, Tensor) and labels.dim() == 2:
            self._next = pad(labels, (0, 1), value=IGNORED)[:, 1:]

    def project(self, hidden: Tensor) -> Tensor:
        """Forward of the head: [rows, length, hidden] -> [1, labeled tokens, vocabulary], or logits of all tokens."""
        if self._next is None or hidden.shape[:-1] != self._next.shape:
            return self._project(hidden)
        following = self._next.to(hidden.device)
        labeled = following != IGNORED
        hidden, self._labels = hidden[labeled], following[labeled]
        dtype = self._chunked_dtype(hidden)
        if dtype is None:
            return self._project(hidden)[None]
        self._sum = _SummedLoss.apply(hidden.to(dtype), self._head.weight, self._head.bias, self._labels)
        return hidden.new_empty(1, len(hidden), 0)

    def _chunked_dtype(self, hidden: Tensor) -> torch.dtype | None:
        """Return the data type for the chunked loss; None: hooks may read the logits, or the head trains.

        In float16 it is None, too: gradients before scaling would underflow.
        """
        weight, bias = self._head.weight, self._head.bias
        parts = [weight] if bias is None else [weight, bias]
        if not self._straight or has_hooks(self._head) or any(part.requires_grad for part in parts):
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
        """Replacement for transformers' loss, over labeled tokens.

        Args:
            num_items_in_batch: number of labels that the sum is divided by; None: the labels of this call.
        """
        total, self._sum = self._sum, None  # it would keep the graph alive
        if total is not None and self._labels is not None:
            count = len(self._labels) if num_items_in_batch is None else num_items_in_batch
            return total / (count.to(total.device) if isinstance(count, Tensor) else count)
        if self._labels is not None:
            kwargs["shift_labels"] = self._labels[None]
        return causal_loss(logits, labels, vocab_size, num_items_in_batch, **kwargs)


class _SummedLoss(torch.autograd.Function):
    """Chunked cross-entropy of `softmax(W x + b)`, summed over tokens, with a frozen W.

    The forward pass also computes the gradient, while a chunk's logits exist; the number of matrix products is the same
    as usual. PyTorch 2.13 has `linear_cross_entropy`, which does the same; older supported releases do not.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """
        Args:
            hidden: x, [tokens, channels], in the data type of the computation.
            weight, bias: W [vocabulary, channels] and b [vocabulary], in any data type.
            labels: [tokens].

        Returns:
            Sum of the losses, [], float32.
        """
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
        gradient = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        at_once = max((_LOGIT_BYTES_ON_CPU if hidden.is_cpu else _LOGIT_BYTES) // (4 * len(weight)), _LEAST_CHUNK)
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
