"""Language-model head in training: logits of labeled tokens only, some tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lightpeft.compat.torch import has_hooks
from lightpeft.compat.transformers import causal_loss, has_causal_loss, override_loss
from lightpeft.machine import compute_dtype
from lightpeft.models.batches import IGNORED
from lightpeft.models.head import language_head, record_head, two_tokens
from lightpeft.models.patching import override_forward
from lightpeft.models.unwrap import transformers_model
from lightpeft.training.token_scores import REPORTED, token_scores


@contextmanager
def labeled_head(model: nn.Module, *, loss_only: bool = True) -> Iterator[None]:
    """Compute the logits of labeled tokens only while a causal language model trains inside the block.

    Prompts and padding have no labels, and a vocabulary is much wider than a hidden state: the head and the softmax
    take a good part of a step's time and most of its memory. The loss is the same up to the order of its sum. The
    model's output then has `logits` of shape [1, labeled tokens, vocabulary].

    If the head is frozen and its logits go directly to the loss, cross-entropy is chunked: logits, loss and the
    gradient of hidden states are computed for some tokens at a time, and `logits` has shape [1, labeled tokens, 0].
    TRL's SFT and DPO ask for log-probabilities in place of logits (`fused_lm_head`); they are computed in the same way.

    Models without such a head, or whose logits do not go to transformers' loss, are unchanged, and so are calls without
    labels.

    Args:
        model: a transformers model, or a PeftModel around one.
        loss_only: False if others than the loss may read logits. Calls that ask for log-probabilities get none.
    """
    inner = transformers_model(model)
    head = language_head(inner)
    way = _way_to_loss(inner, head) if head is not None and has_causal_loss(inner) else None
    if head is None or way is None:
        yield
        return
    labeled = _LabeledHead(head, way, loss_only=loss_only)
    handles = [
        inner.register_forward_pre_hook(labeled.begin, with_kwargs=True),
        inner.register_forward_hook(labeled.end),
    ]
    try:
        with override_loss(inner, labeled.loss), override_forward(head, labeled.project):
            yield
    finally:
        for handle in handles:
            handle.remove()


_FUSED = "fused_lm_head"
"""Argument by which TRL asks a model for log-probabilities in place of logits."""


@dataclass(frozen=True)
class _WayToLoss:
    """How logits get from a model's head to transformers' loss."""

    straight: bool
    """True if they are unchanged, False if they are changed, with the same positions."""
    answer: type[Any] | None
    """Class of the output with log-probabilities (`fused_lm_head`); None: the model has none, or in another way."""
    reported: tuple[str, ...] = ()
    """What that output has of each token beside the log-probability, of `REPORTED`."""


def _way_to_loss(inner: Any, head: nn.Linear) -> _WayToLoss | None:
    """Find out how logits get from the head to transformers' loss, by a call with two tokens; None: not at all."""
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
    straight = len(given) == 1 and taken[0] is given[0]
    return _WayToLoss(straight, *_fused_answer(inner, head, taken[0]) if straight else (None,))


def _fused_answer(inner: Any, head: nn.Linear, logits: Tensor) -> tuple[type[Any] | None, tuple[str, ...]]:
    """Find out which output with log-probabilities a model gives, by a call with two tokens; None: none, or others.

    Trainers that report no accuracy (GRPO) may train on the entropy, divide logits and compute them in another type.

    Args:
        logits: logits of the two tokens, [1, 2, vocabulary].
    """
    if "forward" not in vars(inner):  # TRL replaces it
        return None, ()
    inputs = two_tokens(inner)
    tokens = inputs["input_ids"]
    try:
        with record_head(head):
            answer = inner(**inputs, labels=tokens, **{_FUSED: True})
        reported = tuple(name for name in answer if name not in ("loss", "log_probs", "label_mask", "aux_loss"))
        expected = torch.log_softmax(logits[:, 0], -1, dtype=torch.float32).gather(-1, tokens[:, 1:])
        same = torch.allclose(answer["log_probs"], expected, rtol=1e-3, atol=1e-3)
    except Exception:  # noqa: BLE001 - it has no such argument, or another output
        return None, ()
    return (type(answer), reported) if same and "is_top1" in reported and {*reported} <= {*REPORTED} else (None, ())


class _LabeledHead:
    """Replacements for one model's head and loss."""

    def __init__(self, head: nn.Linear, way: _WayToLoss, *, loss_only: bool) -> None:
        """
        Args:
            way: how the head's logits go to the loss.
            loss_only: False to change only calls that ask for log-probabilities.
        """
        self._head, self._way, self._loss_only = head, way, loss_only
        self._project: Callable[[Tensor], Tensor] = head.forward
        self._next: Tensor | None = None
        """Label of each position's next token, [rows, length]; None: compute logits of all tokens."""
        self._fused = False
        """True if the current call gets log-probabilities."""
        self._labels: Tensor | None = None
        """Labels of labeled tokens, [labeled tokens]; None: the current call computes logits of all tokens."""
        self._scores: tuple[Tensor, dict[str, Tensor]] | None = None
        """Result of `token_scores` for the labeled tokens; None: not computed."""

    def begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of the model: note which tokens have labels, and ask for logits in any case."""
        labels, asked = kwargs.get("labels"), bool(kwargs.get(_FUSED))
        elsewhere = kwargs.get("shift_labels") is not None or kwargs.get("logits_to_keep")
        of_labels_only = not elsewhere and isinstance(labels, Tensor) and labels.dim() == 2
        chunked = self._way.answer is not None and self._chunked_dtype() is not None
        self._fused = asked and of_labels_only and chunked
        self._next = self._labels = self._scores = None
        if self._fused or (of_labels_only and not asked and self._loss_only and module.training):
            assert labels is not None
            self._next = pad(labels, (0, 1), value=IGNORED)[:, 1:]
        if not self._fused:
            return None
        return args, {**{name: value for name, value in kwargs.items() if name != _FUSED}, "use_cache": False}

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the model: return log-probabilities if the call asked for them, as TRL's own head does."""
        if not self._fused:
            return None
        assert self._next is not None and self._scores is not None and self._way.answer is not None
        mask = self._next[:, :-1] != IGNORED
        log_probs, others = self._scores
        self._scores = None  # it would keep the graph alive
        values = {"log_probs": log_probs, **others}
        of_tokens = {
            name: of.new_zeros(mask.shape).masked_scatter(mask.to(of.device), of) for name, of in values.items()
        }
        return self._way.answer(
            loss=output.loss, label_mask=mask, aux_loss=getattr(output, "aux_loss", None), **of_tokens
        )

    def project(self, hidden: Tensor) -> Tensor:
        """Forward of the head: [rows, length, hidden] -> [1, labeled tokens, vocabulary], or logits of all tokens."""
        if self._next is None or hidden.shape[:-1] != self._next.shape:
            return self._project(hidden)
        following = self._next.to(hidden.device)
        labeled = following != IGNORED
        hidden, self._labels = hidden[labeled], following[labeled]
        dtype = self._chunked_dtype()
        if dtype is None:
            return self._project(hidden)[None]
        reported = self._way.reported if self._fused else ()
        self._scores = token_scores(hidden.to(dtype), self._head, self._labels, reported)
        return hidden.new_empty(1, len(hidden), 0)

    def _chunked_dtype(self) -> torch.dtype | None:
        """Return the data type for chunked logits; None: hooks may read the logits, or the head trains.

        In float16 it is None, too: gradients before scaling would underflow.
        """
        weight, bias = self._head.weight, self._head.bias
        parts = [weight] if bias is None else [weight, bias]
        if not self._way.straight or has_hooks(self._head) or any(part.requires_grad for part in parts):
            return None
        dtype = compute_dtype(*parts)
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
        if self._scores is not None and self._labels is not None:
            total, count = -self._scores[0].sum(), num_items_in_batch
            if not self._fused:
                self._scores = None  # it would keep the graph alive
            if count is None:
                count = len(self._labels)
            return total / (count.to(total.device) if isinstance(count, Tensor) else count)
        if self._labels is not None:
            kwargs["shift_labels"] = self._labels[None]
        return causal_loss(logits, labels, vocab_size, num_items_in_batch, **kwargs)
