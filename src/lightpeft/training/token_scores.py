"""Log-probabilities of next tokens from hidden states, with only some tokens' logits in memory at a time."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightpeft.errors import require

_LOGIT_BYTES, _LOGIT_BYTES_ON_CPU = 2**28, 2**25
"""Bytes of float32 logits in memory at a time: few compared with a model, and enough for efficient matrix products."""
_LEAST_CHUNK = 64
"""Least tokens per chunk, however large the vocabulary is."""
REPORTED = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""What can be had of a token beside its log-probability; a loss cannot train on it."""


def token_scores(
    hidden: Tensor, head: nn.Linear, labels: Tensor, reported: Collection[str] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the log-probability of each label under the softmax of a frozen head's logits.

    Args:
        hidden: hidden states, [tokens, channels], in the data type of the computation.
        head: linear layer; its weights do not train.
        labels: [tokens].
        reported: names of further results, of `REPORTED`.

    Returns:
        Log-probabilities, [tokens], float32, and the further results by name, each [tokens], without gradients.
    """
    log_probs, *others = _TokenScores.apply(hidden, head.weight, head.bias, labels, tuple(reported))
    return log_probs, dict(zip(reported, others, strict=True))


class _TokenScores(torch.autograd.Function):
    """Chunked log-softmax of `W x + b` at the labels, with a frozen W.

    The forward pass also computes the gradient, while a chunk's logits exist; the number of matrix products is the same
    as usual. PyTorch 2.13 has `linear_cross_entropy`, which does the same; older supported releases do not.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, reported: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
        trains = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if trains else hidden
        log_probs = hidden.new_empty(len(hidden), 1, dtype=torch.float32)
        others = [hidden.new_empty(len(hidden), dtype=_dtype_of(name)) for name in reported]
        at_once = max((_LOGIT_BYTES_ON_CPU if hidden.is_cpu else _LOGIT_BYTES) // (4 * len(weight)), _LEAST_CHUNK)
        split = partial(torch.chunk, chunks=max(-(-len(hidden) // at_once), 1))
        parts = zip(*map(split, (hidden, labels[:, None], gradient, log_probs, *others)), strict=True)
        with torch.autocast(hidden.device.type, enabled=False):
            for states, wanted, back, of_labels, *told in parts:
                logits = nn.functional.linear(states, weight, bias)
                scores = torch.log_softmax(logits, -1, dtype=torch.float32)
                torch.gather(scores, -1, wanted, out=of_labels)
                probabilities = scores.exp() if reported else scores.exp_()
                for name, place in zip(reported, told, strict=True):
                    place.copy_(_report(name, logits, scores, probabilities, wanted))
                if trains:
                    of_logits = probabilities.scatter_add_(-1, wanted, scores.new_full(wanted.shape, -1.0))
                    torch.mm(logits.copy_(of_logits), weight, out=back)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(of for name, of in zip(reported, others, strict=True) if name != "entropy"))
        ctx.save_for_backward(gradient)
        return (log_probs.squeeze(-1), *others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_log_probs: Tensor | None, *of_others: Tensor | None) -> tuple[Tensor | None, ...]:
        reports_only = "this loss trains on the entropy of tokens, which lightpeft computes for reports only"
        require(
            all(each is None for each in of_others), f"{reports_only}; pass fast_steps=False, or leave out accelerated"
        )
        if of_log_probs is None:
            return None, None, None, None, None
        (gradient,) = ctx.saved_tensors  # of the negative log-probabilities
        of_hidden = gradient.float().mul_(-of_log_probs[:, None])  # a factor in half precision would be off
        return of_hidden.to(gradient.dtype), None, None, None, None


def _dtype_of(name: str) -> torch.dtype:
    return torch.bool if name == "is_top1" else torch.float32


def _report(name: str, logits: Tensor, scores: Tensor, probabilities: Tensor, wanted: Tensor) -> Tensor:
    """Compute one of `REPORTED` for some tokens, [tokens].

    Args:
        logits, scores, probabilities: logits, log-probabilities and probabilities, [tokens, vocabulary].
        wanted: labels, [tokens, 1].
    """
    if name == "is_top1":
        return scores.argmax(-1) == wanted.squeeze(-1)
    if name == "mean_logits":
        return logits.mean(-1, dtype=torch.float32)
    if name == "log_sum_sq_probs":
        return torch.logsumexp(2 * scores, -1)
    return -torch.linalg.vecdot(probabilities, scores)
