"""Attention in bfloat16 on a CPU: PyTorch's forward pass, with a backward pass of plain matrix products.

The backward pass of PyTorch's CPU kernel is several times slower than the matrix products in it, most of all on CPUs
with matrix units for bfloat16. Attention written as products would store the probabilities of all layers. Here nothing
is stored beyond what the kernel stores, and probabilities are recomputed, some rows at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from lightpeft.compat.torch import change_count, softmax_backward
from lightpeft.compat.transformers import recomputes
from lightpeft.models.patching import override_forward
from lightpeft.models.unwrap import transformers_model

LONGEST = 256
"""Longest row, in tokens, for which products are faster; on CPUs with matrix units for bfloat16 it would be 512."""
_PROBABILITY_BYTES = 2**22
"""Bytes of probabilities that are computed together, about the size of a CPU cache."""


@contextmanager
def attention_by_products(model: nn.Module) -> Iterator[None]:
    """Compute gradients of `scaled_dot_product_attention` in the model by plain products inside the block.

    The forward pass is bitwise the same, gradients are the same up to rounding. This applies to bfloat16 on a CPU, up
    to `LONGEST` tokens, without dropout, if no kernel was chosen. It does not apply under gradient checkpointing, which
    recomputes attention outside of the model's forward pass.

    Args:
        model: a transformers model, or a PeftModel around one.
    """
    inner = transformers_model(model)
    usual = inner.forward

    @functools.wraps(usual)
    def forward(*args: Any, **kwargs: Any) -> Any:
        on_cpu = next(inner.parameters()).device.type == "cpu"
        if not on_cpu or not torch.is_grad_enabled() or recomputes(inner):
            return usual(*args, **kwargs)
        with ByProducts():
            return usual(*args, **kwargs)

    with override_forward(inner, forward):
        yield


class ByProducts(TorchFunctionMode):
    """Mode in which `scaled_dot_product_attention` has a backward pass of products where that is faster."""

    def __init__(self) -> None:
        super().__init__()
        self._masks = _Masks()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._attention(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Compute attention with the arguments of `scaled_dot_product_attention`."""
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (states.to(torch.get_autocast_dtype("cpu")) for states in (query, key, value))
        if dropout_p or not _are_faster(query, key, value, attn_mask):
            return scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if enable_gqa:
            key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
        bias, attends = self._masks.of(query, key, attn_mask, is_causal)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return _AttentionFunction.apply(query, key, value, attn_mask, is_causal, scale, bias, attends)


def _are_faster(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Return True if products compute the gradients of these tensors faster than PyTorch's kernel."""
    given = (query, key, value)
    trains = any(states.requires_grad for states in given) and not (mask is not None and mask.requires_grad)
    usual = all(states.dtype == torch.bfloat16 and states.is_cpu and states.dim() == 4 for states in given)
    chosen = not torch.backends.cuda.flash_sdp_enabled()  # PyTorch's switch for CPUs, too
    return trains and usual and not chosen and max(query.shape[2], key.shape[2]) <= LONGEST


class _Masks:
    """Additive masks, computed once for all layers that share an attention mask."""

    def __init__(self) -> None:
        self._given: tuple[Any, ...] = ()
        self._mask: Tensor | None = None
        self._terms: tuple[Tensor | None, Tensor | None] = (None, None)

    def of(
        self, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the additive mask of an attention call, and the tokens that attend to any key.

        Returns:
            Mask [1 or batch, 1 or heads, tokens, keys]; None if every token attends to all keys. Tokens [..., tokens,
            1], bool; None if every token attends to at least one key.
        """
        given = (None if mask is None else change_count(mask), is_causal, query.shape[2], key.shape[2])
        if self._mask is not mask or self._given != given:
            self._mask, self._given = mask, given
            if is_causal:
                mask = query.new_ones(*given[2:], dtype=torch.bool).tril()
            self._terms = (None, None) if mask is None else _additive_mask(mask, query.dtype)
        return self._terms


def _additive_mask(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Convert a mask to an additive one, and find the tokens that attend to any key (None: all do)."""
    lowest = torch.finfo(dtype).min
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    finite = mask.new_zeros(mask.shape, dtype=dtype) if mask is seen else mask.to(dtype).clamp(min=lowest)
    attends = seen.any(-1, keepdim=True)
    return finite.masked_fill(~seen, lowest), None if attends.all() else attends


class _AttentionFunction(torch.autograd.Function):
    """`softmax(scale Q K' + bias) V`, each [batch, heads, tokens, channels]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
        bias: Tensor | None,
        attends: Tensor | None,
    ) -> Tensor:
        """
        Args:
            mask, is_causal: arguments of PyTorch's attention, for the forward pass.
            bias, attends: the same mask as `_Masks.of` returns it, for the backward pass.
        """
        ctx.save_for_backward(query, key, value, bias, attends)
        ctx.scale = scale
        return scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, attends = ctx.saved_tensors
        if attends is not None:
            gradient = gradient * attends  # the output of a token that attends to nothing is constantly zero
        batch, heads, tokens, _ = query.shape
        keys = key.shape[2]
        results = [torch.empty(states.shape, dtype=states.dtype) for states in (query, key, value)]
        bias = None if bias is None else bias.expand(batch, heads, tokens, keys)
        rows = max(_PROBABILITY_BYTES // (heads * tokens * keys * query.element_size()), 1)
        with torch.autocast("cpu", enabled=False):
            for start in range(0, batch, rows):
                part = slice(start, start + rows)
                given = [states[part].flatten(0, 1) for states in (gradient, query, key, value)]
                term = None if bias is None else bias[part].clone(memory_format=torch.contiguous_format).flatten(0, 1)
                _write_gradients(given, term, ctx.scale, [result[part].flatten(0, 1) for result in results])
        return (*results, None, None, None, None, None)


def _write_gradients(given: list[Tensor], term: Tensor | None, scale: float, results: list[Tensor]) -> None:
    """Compute the gradients of queries, keys and values in place.

    Args:
        given: gradient of the output, queries, keys and values, each [heads, tokens, channels].
        term: additive mask of the scores, [heads, tokens, keys]; it is overwritten. None: no mask.
        results: tensors that the three gradients are written to.
    """
    (gradient, query, key, value), (of_query, of_key, of_value) = given, results
    scores = torch.bmm(query, key.mT).mul_(scale) if term is None else term.baddbmm_(query, key.mT, alpha=scale)
    probabilities = torch.softmax(scores, -1)
    torch.bmm(probabilities.mT, gradient, out=of_value)
    of_probabilities = torch.bmm(gradient, value.mT, out=scores)
    of_scores = softmax_backward(of_probabilities, probabilities)
    torch.bmm(of_scores, key, out=of_query).mul_(scale)
    torch.bmm(of_scores.mT, query, out=of_key).mul_(scale)
